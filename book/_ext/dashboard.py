"""{dashboard}: every item of both papers, the notebook that recomputes it, and how it compares.

Its rows are results/published/items.csv; a gain is read from summary.json (ours) and from the
tables of published numbers (theirs), none is typed. `;` separates gains of ours on other data.
"""

import math
from pathlib import Path
from typing import Any

from claims import DATA
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fmnlib.stats import OUTCOMES, outcome, points
from results import paired, read

HEADS = ("item", "what it shows", "page", "ours", "theirs", "status")


class Dashboard(SphinxDirective):
    """A table of the items; nothing to set."""

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["dashboard"])
        try:
            rows = [self.row(item) for item in read(self.env, "published/items.csv")]
        except (OSError, LookupError, ValueError) as error:
            raise self.error(f"results/published/items.csv cannot be shown ({error!r})") from error
        lines = [":::{list-table} Each item of both papers. Gains are in percentage points."]
        lines += [":name: tab-dashboard", ":header-rows: 1", ":widths: 16 30 10 15 10 19", ""]
        for row in (HEADS, *rows):
            lines += [f"{'* -' if n == 0 else '  -'} {cell}" for n, cell in enumerate(row)]
        self.state.nested_parse(StringList([*lines, ":::"], ""), self.content_offset, box)
        return [box]

    def row(self, item: dict[str, str]) -> tuple[str, ...]:
        keys = [key.strip() for key in item["ours"].split(";") if key.strip()]
        ours = [(DATA.get(key.partition(".")[0], "digits"), *self.ours(key)) for key in keys]
        theirs = self.theirs(item["theirs"])
        page = Path(self.env.srcdir, "notebooks", f"{item['notebook']}.ipynb")
        link, status = "", "not measured"
        if item["notebook"] and page.exists():
            repository = self.config.html_theme_options["repository_url"].split("github.com/")[1]
            colab = f"https://colab.research.google.com/github/{repository}/blob/main"
            colab += f"/notebooks/{page.name}"
            link = f"[{page.stem[:2]}](/notebooks/{page.name}) ([Colab]({colab}))"
            status = "quick profile"
        for data, _, ends in ours if theirs is not None else []:
            found = outcome(*ends[1:])
            agree = "same direction" if ends[0] * theirs > 0 else "**other direction**"
            status += f"; {data}: {agree if found in ('found', 'opposite') else OUTCOMES[found]}"
        few = " (n = 2)"  # seeds, whose interval is wide
        gains = [f"{data}: {points(*ends)}{few * (n == 2)}" for data, n, ends in ours]
        gains = [gain.replace(", ", ",\u00a0") for gain in gains]
        shown = ["; ".join(gains)]
        shown += ["" if theirs is None else points(theirs, math.nan, math.nan)]
        return f"{item['paper']}, {item['item']}", item["shows"], link, *shown, status

    def ours(self, key: str) -> tuple[int, tuple[float, float, float]]:
        """The number of seeds; the difference and the ends of its interval."""
        item, setting, method, baseline = key.split(".")
        methods = read(self.env, "summary.json")[item][setting]
        terms = [methods[method], methods[baseline]]
        return min(len(term["seeds"]) for term in terms), paired(terms, [1, -1])

    def theirs(self, key: str) -> float | None:
        if not key:
            return None
        table, column, *methods = key.split(".")
        rows = {row["method"]: row for row in read(self.env, f"published/{table}.csv")}
        first, *rest = (float(rows[method][column].split()[0]) for method in methods)
        return first - sum(rest)  # a table of gains names no second method


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("dashboard", Dashboard)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
