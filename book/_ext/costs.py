"""Tables of what commands left in results/.

{benchmark-table}: of `make benchmarks`. {verdict-table}: of `python -m benchmarks.verdict`.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class BenchmarkTable(SphinxDirective):
    """Medians with their range, beside the usual script and what the hardware allows."""

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["dashboard"])
        for path in sorted(Path(self.env.srcdir, "results", "benchmarks").glob("*.md")):
            self.env.note_dependency(str(path))
            caption, table, origin = path.read_text(encoding="utf-8").split("\n\n")
            lines = [f":::{{table}} {caption}", f":name: tab-benchmarks-{path.stem}"]
            lines += [":widths: 34 10 20 18 8 18", "", *table.splitlines(), ":::", ""]
            lines += ["{.origin}", *origin.splitlines()]
            self.state.nested_parse(StringList(lines, ""), self.content_offset, box)
        return [box]


class VerdictTable(SphinxDirective):
    """How many runs of each case have which verdict; the true one, where it is known, in bold."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir, "results", "verdict.json")
        self.env.note_dependency(str(path))
        verdicts = ("none", "local", "classic", "refused")
        table = [["", "runs", "nothing beyond churn", *verdicts[1:]]]
        for row in json.loads(path.read_text(encoding="utf-8")):
            counts = {v: f"**{row[v]}**" if v == row["truth"] else str(row[v]) for v in verdicts}
            table.append([row["case"], str(row["runs"]), *counts.values()])
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        lines.insert(1, "| --- |" + " ---: |" * (len(table[0]) - 1))
        caption = (
            ":::{table} **Verdicts of the diagnosis.** Runs of each case by verdict; in bold the "
            "true one, where it is known. Simulated runs come first: 2,000 samples, 20 epochs and "
            "10 classes where nothing else is said."
        )
        box = nodes.container(classes=["dashboard"])
        lines = [caption, ":name: tab-verdicts", "", *lines, ":::"]
        self.state.nested_parse(StringList(lines, ""), self.content_offset, box)
        return [box]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("benchmark-table", BenchmarkTable)
    app.add_directive("verdict-table", VerdictTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
