"""{claims}: each claim of the papers, where the book tests it, and what came out.

Its rows are results/published/claims.csv. A claim is one or more sums of numbers in summary.json,
each with the sign that the claim expects; none of the numbers is typed.
"""

import math
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from results import read

HEADS = ("claim", "outcome", "difference, in points", "tested in")
CLEAR = 2  # errors of the difference


class Claims(SphinxDirective):
    """A table of the claims; nothing to set."""

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["dashboard"])
        lines = [":::{list-table} The papers' claims on the quick profile, mean ± standard error."]
        lines += [":name: tab-outcomes", ":header-rows: 1", ":widths: 34 20 22 24", ""]
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
        shown = [f"{s}\u00a0{mean:+.1f}\u00a0±\u00a0{error:.1f}" for s, mean, error in found]
        links = [f"[{page}](/notebooks/{page}.ipynb)" for page in pages]
        told = f"{claim['claim']} ({claim['paper']})"
        points = ", ".join(shown).replace("-", "−")
        return told, outcome(found, claim["expects"]), points, ", ".join(links)

    def total(self, words: list[str]) -> tuple[float, float]:
        """Mean and standard error of `a - b + c`; the errors are taken to be independent."""
        signs = [1, *(-1 if sign == "-" else 1 for sign in words[1::2])]
        summary, terms = read(self.env, "summary.json"), []
        for key in words[::2]:
            item, setting, method = key.split(".", 2)
            terms.append(summary[item][setting][method])
        mean = sum(sign * term["mean"] for sign, term in zip(signs, terms, strict=True))
        return mean, math.hypot(*(term["sem"] for term in terms))

    def page(self, item: str) -> str:
        [page] = Path(self.env.srcdir, "notebooks").glob(f"[0-9]*_{item}.ipynb")
        return page.stem


def outcome(found: list[tuple[str, float, float]], expects: str) -> str:
    """In words: yes, no, or where which."""
    above = [s for s, mean, error in found if mean > CLEAR * error]
    below = [s for s, mean, error in found if mean < -CLEAR * error]
    good = [s for s, mean, _ in found if mean >= 0] if expects == "no less" else above
    if len(good) == len(found):
        return "**found**"
    parts = [f"found at {', '.join(good)}"] if good else []
    parts += [f"**the opposite** at {', '.join(below)}"] if below else []
    return "; ".join(parts) or "not found"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("claims", Claims)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
