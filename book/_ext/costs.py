"""Tables of what commands left in results/.

{benchmark-table}: of `make benchmarks`. {verdict-table}: of `python -m benchmarks.verdict`.
{fuzz-table}: of `make fuzz`. {mutants-table}: of `make mutants`, with the survivors.
"""

import json
from pathlib import Path
from typing import Any

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
        verdicts = ("none", "local", "classic", "refused")
        table = [["", "runs", "nothing beyond churn", *verdicts[1:]]]
        for row in _read(self, "verdict.json"):
            counts = {v: f"**{row[v]}**" if v == row["truth"] else str(row[v]) for v in verdicts}
            table.append([row["case"], str(row["runs"]), *counts.values()])
        caption = (
            "**Verdicts of the diagnosis.** Runs of each case by verdict; in bold the "
            "true one, where it is known. Simulated runs come first: 2,000 samples, 20 epochs and "
            "10 classes where nothing else is said."
        )
        return _table(self, caption, "tab-verdicts", table)


class FuzzTable(SphinxDirective):
    """How many damaged files and arguments of each kind ended how."""

    def run(self) -> list[nodes.Node]:
        found = _read(self, "fuzz.json")
        ends = ("refused", "same", "other", "fault")
        table = [["damaged", *ends]]
        every = found["kinds"] | {"all": found["total"]}
        table += [[kind, *(str(of.get(end, 0)) for end in ends)] for kind, of in every.items()]
        caption = (
            f"**Damaged files and arguments.** How {found['cases']:,} cases ended: refused in one "
            "line; the same outcome as undamaged; another valid one, of what carries no checksum; "
            "or a fault."
        )
        return _table(self, caption, "tab-fuzz", table)


class MutantsTable(SphinxDirective):
    """How many mutants of each module the tests killed, and which survived."""

    def run(self) -> list[nodes.Node]:
        found = _read(self, "mutants.json")
        table = [["module", "tried", "killed"]]
        table += [[m, str(n["mutants"]), str(n["killed"])] for m, n in found["modules"].items()]
        table += [["all", str(found["sample"]), str(found["killed"])]]
        caption = (
            f"**Mutants that the tests notice.** A random sample of {found['sample']} of the "
            f"{found['all']:,} changes that can be made to a module in one place; "
            f"{found['killed'] / found['sample']:.0%} were noticed."
        )
        rows = [["module", "change", "why it may live"]]
        for one in found["survivors"]:
            change = one["change"].replace("`", "").replace("|", "\\|")
            rows.append([one["module"], f"`` {change} ``", one["reason"] or "not looked into"])
        about = "**Mutants that no test noticed.** The change, and the line that it is made in."
        counts = _table(self, caption, "tab-mutants", table)
        return counts + _table(self, about, "tab-survivors", rows, side="---")


def _read(directive: SphinxDirective, name: str) -> Any:
    path = Path(directive.env.srcdir, "results", name)
    directive.env.note_dependency(str(path))
    return json.loads(path.read_text(encoding="utf-8"))


def _table(
    directive: SphinxDirective, caption: str, name: str, rows: list[list[str]], side: str = "---:"
) -> list[nodes.Node]:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    lines.insert(1, "| --- |" + f" {side} |" * (len(rows[0]) - 1))
    box = nodes.container(classes=["dashboard"])
    lines = [f":::{{table}} {caption}", f":name: {name}", "", *lines, ":::"]
    directive.state.nested_parse(StringList(lines, ""), directive.content_offset, box)
    return [box]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("benchmark-table", BenchmarkTable)
    app.add_directive("verdict-table", VerdictTable)
    app.add_directive("fuzz-table", FuzzTable)
    app.add_directive("mutants-table", MutantsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
