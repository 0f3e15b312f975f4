"""Descriptions of attributes are read as they stand: what precedes a colon is no type.

Napoleon would make a type and its description of "Label noise: none, symmetric or human". So it
gets a description without a colon, which is put back when it is done.
"""

from sphinx.application import Sphinx

COLON = "\N{RATIO}"  # looks alike, and stands nowhere else


def describe(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", COLON)


def restore(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    napoleon = 500
    app.connect("autodoc-process-docstring", describe, priority=napoleon - 1)
    app.connect("autodoc-process-docstring", restore, priority=napoleon + 1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
