"""{benchmark-table}: the tables that `make benchmarks` left in results/benchmarks/."""

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


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("benchmark-table", BenchmarkTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
