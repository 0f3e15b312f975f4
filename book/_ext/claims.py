"""{claims}: each claim of the papers, where the book tests it, and what came out.

Its rows are results/published/claims.csv. A claim is a difference of numbers in summary.json, such
as `label_noise.*.kf - label_noise.*.single`; the star stands for every condition that has them,
and `;` separates other places that test the same. None of the numbers is typed. There is a row
for each claim, data set and regime. Fashion-MNIST has no notebook: its numbers are those of the
grid in results/cpu.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fmnlib.record import Result
from fmnlib.stats import MARGIN, OUTCOMES, outcome, points, readable, summarize
from results import REGIMES as IN_WORDS
from results import paired, read

HEADS = ("claim", "data, regime", "outcome", "difference, in points", "page")
DATA = {"cifar100": "CIFAR-100", "local_overfitting": "points in the plane"}
DATA |= {"fashion_mnist": "Fashion-MNIST"}
REGIMES = IN_WORDS | {"resnet8": "ResNet-8, own recipe"}
Found = tuple[str, int, float, float, float]  # noise, number of seeds, mean, interval


class Claims(SphinxDirective):
    """A table of the claims; nothing to set."""

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["dashboard"])
        lines = [":::{list-table} The papers' claims, and ours: means and 95% intervals."]
        lines += [":name: tab-outcomes", ":header-rows: 1", ":widths: 28 14 18 32 8", ""]
        try:
            claims = read(self.env, "published/claims.csv")
            rows = [row for claim in claims for row in self.rows(claim)]
        except (OSError, LookupError, ValueError) as error:
            raise self.error(
                f"results/published/claims.csv cannot be shown ({error!r})"
            ) from error
        for row in (HEADS, *rows):
            lines += [f"{'* -' if n == 0 else '  -'} {cell}" for n, cell in enumerate(row)]
        self.state.nested_parse(StringList([*lines, ":::"], ""), self.content_offset, box)
        return [box]

    def rows(self, claim: dict[str, str]) -> list[tuple[str, ...]]:
        """One row a data set and regime."""
        cells = read(self.env, "cpu/results.json")["cells"]
        summary = with_grid(read(self.env, "summary.json"), cells)
        groups: dict[tuple[str, str], list[Found]] = {}
        for item, setting, terms, signs in expand(claim, summary):
            regime = setting.partition("_")[0]
            regime = regime if regime in REGIMES else ""
            noise = readable(setting.removeprefix(f"{regime}_"))
            seeds = min(len(term["seeds"]) for term in terms)
            groups.setdefault((item, regime), []).append((noise, seeds, *paired(terms, signs)))
        if not groups:
            raise LookupError(f"no number for the claim {claim['claim']!r}")
        rows = []
        for (item, regime), found in groups.items():
            where = ", ".join(filter(None, (DATA.get(item, "digits"), REGIMES.get(regime))))
            shown = [
                f"{noise}: {points(*ends)}".replace(", ", ",\u00a0").replace(" [", "\u00a0[")
                for noise, _, *ends in found
            ]
            link = "[larger runs](/book/larger.md)"
            if item != "fashion_mnist":
                page = self.page(item)
                link = f"[{page[:2]}](/notebooks/{page}.ipynb)"
            words = in_words(found, claim["expects"])
            name = f"{claim['claim']} ({claim['paper']})"
            rows.append((name, where, words, "; ".join(shown), link))
        return rows

    def page(self, item: str) -> str:
        [page] = Path(self.env.srcdir, "notebooks").glob(f"[0-9]*_{item}.ipynb")
        return page.stem


def with_grid(summary: dict[str, Any], cells: dict[str, Any]) -> dict[str, Any]:
    """The summary, and beside it what the grid's cells have measured on Fashion-MNIST."""
    measured = [cell for name, cell in cells.items() if name.startswith("fashion_mnist")]
    rows = [Result(**row) for cell in measured for row in cell["results"]]
    return summary | {"fashion_mnist": summarize(rows)}


def expand(
    claim: dict[str, str], summary: dict[str, Any]
) -> list[tuple[str, str, list[dict[str, Any]], list[int]]]:
    """Item, setting, terms and their signs of every place that tests a claim.

    A claim of `noise` clean or noisy keeps the stars to such conditions.
    """
    places = []
    for text in claim["differences"].split(";"):
        words = text.split()
        signs = [1, *(-1 if sign == "-" else 1 for sign in words[1::2])]
        keys = [key.split(".", 2) for key in words[::2]]
        item, pattern = keys[0][:2]
        for setting in summary[item] if "*" in pattern else [pattern]:
            fits = {"clean": "clean" in setting, "noisy": "clean" not in setting}
            named = [(i, s.replace("*", setting), m) for i, s, m in keys]
            there = all(m in summary[i].get(s, {}) for i, s, m in named)
            if "*" not in pattern or (there and fits.get(claim["noise"], True)):
                terms = [summary[i][s][m] for i, s, m in named]
                places.append((item, setting, terms, signs))
    return places


def in_words(found: list[Found], expects: str) -> str:
    """The outcome of a claim over conditions: one word, or where which."""
    where: dict[str, list[str]] = {}
    for noise, seeds, mean, low, high in found:
        word = OUTCOMES[outcome(low, high)] + " (n = 2)" * (seeds == 2)
        if expects == "no less" and low > -MARGIN:
            word = f"no loss of {MARGIN} points"
        elif low != low:  # a single seed has no interval
            word = f"one seed, {'above' if mean > 0 else 'not above'} zero"
        where.setdefault(word, []).append(noise)
    if len(where) == 1:
        return f"**{next(iter(where))}**"
    return "; ".join(f"**{word}** at {', '.join(noises)}" for word, noises in where.items())


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("claims", Claims)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
