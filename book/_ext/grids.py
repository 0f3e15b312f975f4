"""{grid-table} cpu: what a grid of runs has measured, cell by cell, from results/cpu/results.json.

A cell that no machine has measured says so; the papers' numbers of the same cell stand beside it.
"""

from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst.directives import unchanged_required
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from results import read, show

METHODS = "single early_stopping independent kf averaged_kf distilled_kf".split()


class GridTable(SphinxDirective):
    """Cells down, methods across."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("results", "caption", "name", "published"), unchanged_required
    )

    def run(self) -> list[nodes.Node]:
        from fmnlib.grid import cells
        from fmnlib.plots import METHODS as LOOKS

        name = f"{self.options['results']}/results.json"
        there = Path(self.env.srcdir, "results", name).exists()
        content = read(self.env, name) if there else {"results": [], "provenance": []}
        found = self.summaries(content["results"])
        heads = ["cell", "seeds", *(LOOKS[m].name for m in METHODS)]
        heads += ["published: final", "published: KF"] if "published" in self.options else []
        lines = [f":::{{csv-table}} {self.options['caption']}", f":name: {self.options['name']}"]
        lines += [":header-rows: 1", ":stub-columns: 1", ":class: numbers", "", ",".join(heads)]
        configs = [cell.config for cell in cells(self.arguments[0]) if not cell.wider]
        for item, setting in dict.fromkeys((f"{c.dataset} {c.model}", c.setting) for c in configs):
            scores = found.get((item.replace(" ", "-"), setting))
            row = [f"{item}, {setting}"]
            row += self.measured(scores) if scores else ["0", *["not measured"] * len(METHODS)]
            lines.append(",".join(row + self.published(setting)))
        box = nodes.container(classes=["results-table"])
        lines += [":::", "", self.origin(content["provenance"])]
        self.state.nested_parse(StringList(lines, ""), self.content_offset, box)
        return [box]

    def summaries(self, rows: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
        from fmnlib.record import Result
        from fmnlib.stats import summarize

        results = [Result(**row) for row in rows]
        items = dict.fromkeys(result.item for result in results)
        by_item = {item: summarize(r for r in results if r.item == item) for item in items}
        return {
            (item, s): methods for item, found in by_item.items() for s, methods in found.items()
        }

    def measured(self, scores: dict[str, dict[str, float]]) -> list[str]:
        return [f"{scores['single']['n']:.0f}", *(show(scores[method]) for method in METHODS)]

    def published(self, setting: str) -> list[str]:
        if "published" not in self.options:
            return []
        rows = {row["method"]: row for row in read(self.env, self.options["published"])}
        key = f"c100_{setting}"
        return [rows[method].get(key) or "not given" for method in ("single", "kf")]

    def origin(self, provenance: list[dict[str, Any]]) -> str:
        if not provenance:
            return "{.origin}\nNot measured yet; the grid's command makes it."
        told = {
            key: sorted({str(p[key]) for p in provenance}) for key in ("device", "torch", "commit")
        }
        return (
            f"{{.origin}}\nMeasured on {', '.join(told['device'])} with torch "
            f"{', '.join(told['torch'])}, commit {', '.join(told['commit'])}: "
            f"{len(provenance)} runs and what is made from them."
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("grid-table", GridTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
