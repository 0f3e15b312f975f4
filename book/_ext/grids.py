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
    """Methods down, cells across."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("results", "caption", "name", "published"), unchanged_required
    )

    def run(self) -> list[nodes.Node]:
        from fmnlib.study.grid import cells
        from fmnlib.study.plots import METHODS as LOOKS

        name = f"{self.options['results']}/results.json"
        there = Path(self.env.srcdir, "results", name).exists()
        content = list(read(self.env, name)["cells"].values()) if there else []
        found = self.summaries([row for cell in content for row in cell["results"]])
        configs = [cell.config for cell in cells(self.arguments[0]) if not cell.wider]
        wanted = dict.fromkeys((f"{c.dataset}-{c.model}", c.setting) for c in configs)
        scores = [found.get(cell) for cell in wanted]
        several = len({item for item, _ in wanted}) > 1
        heads = [item.replace("-", " ") if several else setting for item, setting in wanted]
        rows = {"training seeds": [f"{s['single']['n']:.0f}" if s else "0" for s in scores]}
        for method in METHODS:
            row = [show(s[method]) if s else "not measured" for s in scores]
            rows[LOOKS[method].name] = row
        for method in ("single", "kf") if "published" in self.options else ():
            row = [self.published(method, setting) for _, setting in wanted]
            rows[f"{LOOKS[method].name}, published"] = row
        lines = [f":::{{csv-table}} {self.options['caption']}", f":name: {self.options['name']}"]
        lines += [":header-rows: 1", ":stub-columns: 1", ":class: numbers", ""]
        lines += [",".join(["method", *heads])]
        lines += [",".join([f'"{name}"', *row]) for name, row in rows.items()]
        box = nodes.container(classes=["results-table"])
        lines += [":::", "", self.origin([cell["provenance"] for cell in content])]
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

    def published(self, method: str, setting: str) -> str:
        rows = {row["method"]: row for row in read(self.env, self.options["published"])}
        return rows[method].get(f"c100_{setting}") or "not given"

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
