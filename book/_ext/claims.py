"""{claims}: each claim of the papers, where the book tests it, and what came out.

Its rows are results/published/claims.csv. A claim is one or more sums of numbers in summary.json,
each with the sign that the claim expects; none of the numbers is typed.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fmnlib.stats import points
from results import paired, read

HEADS = ("claim", "outcome", "difference, in points", "page")


class Claims(SphinxDirective):
    """A table of the claims; nothing to set."""

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["dashboard"])
        lines = [":::{list-table} The papers' claims on the quick profile: means, 95% intervals."]
        lines += [":name: tab-outcomes", ":header-rows: 1", ":widths: 36 22 34 8", ""]
        try:
            rows = [self.row(claim) for claim in read(self.env, "published/claims.csv")]
        except (OSError, LookupError, ValueError) as error:
            raise self.error(
                f"results/published/claims.csv cannot be shown ({error!r})"
            ) from error
        for row in (HEADS, *rows):
            lines += [f"{'* -' if n == 0 else '  -'} {cell}" for n, cell in enumerate(row)]
        self.state.nested_parse(StringList([*lines, ":::"], ""), self.content_offset, box)
        return [box]

    def row(self, claim: dict[str, str]) -> tuple[str, ...]:
        sums = [text.split() for text in claim["differences"].split(";")]
        found = [(words[0].split(".")[1].partition("_")[0], *self.total(words)) for words in sums]
        pages = sorted({self.page(words[0].split(".")[0]) for words in sums})
        if len(pages) > 1:  # the same noise, measured twice
            numbers = [self.page(words[0].split(".")[0])[:2] for words in sums]
            found = [
                (f"{s}\u00a0({n})", *rest) for (s, *rest), n in zip(found, numbers, strict=True)
            ]
        shown = [f"{setting}: {points(*ends)}".replace(" ", "\u00a0") for setting, *ends in found]
        links = [f"[{page[:2]}](/notebooks/{page}.ipynb)" for page in pages]
        told = f"{claim['claim']} ({claim['paper']})"
        return told, outcome(found, claim["expects"]), "; ".join(shown), ", ".join(links)

    def total(self, words: list[str]) -> tuple[float, float, float]:
        """`a - b + c`, seed by seed: its mean and 95% interval."""
        signs = [1, *(-1 if sign == "-" else 1 for sign in words[1::2])]
        summary, terms = read(self.env, "summary.json"), []
        for key in words[::2]:
            item, setting, method = key.split(".", 2)
            terms.append(summary[item][setting][method])
        return paired(terms, signs)

    def page(self, item: str) -> str:
        [page] = Path(self.env.srcdir, "notebooks").glob(f"[0-9]*_{item}.ipynb")
        return page.stem


def outcome(found: list[tuple[str, float, float, float]], expects: str) -> str:
    """In words: yes, no, or where which."""
    above = [s for s, _, low, _ in found if low > 0]
    below = [s for s, _, _, high in found if high < 0]
    good, word = above, "found"
    if expects == "no less":
        good, word = [s for s, *_ in found if s not in below], "no loss found"
    if len(good) == len(found):
        return f"**{word}**"
    parts = [f"{word} at {', '.join(good)}"] if good else []
    parts += [f"**the opposite** at {', '.join(below)}"] if below else []
    return "; ".join(parts) or "not clear"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("claims", Claims)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
