"""{benchmark-table}: what `make benchmarks` measured, a table for each file that it left."""

from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from results import read

HEADS = ("measured", "unit", "this library", "usual script", "gain", "at best")
RATIOS = ("%", "x a plain run")  # measured against a run of one's own, so no gain over another's


class BenchmarkTable(SphinxDirective):
    """Medians with their range, beside the usual script and what the hardware allows."""

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["dashboard"])
        for path in sorted(Path(self.env.srcdir, "results", "benchmarks").glob("*.json")):
            content = read(self.env, f"benchmarks/{path.name}")
            about = content["provenance"]
            told = f"Medians and ranges on {about['device']}, {about['threads']} threads."
            lines = [f":::{{list-table}} {told}", f":name: tab-benchmarks-{path.stem}"]
            lines += [":header-rows: 1", ":widths: 34 10 20 18 8 18", ""]
            for row in (HEADS, *map(cells, content["rows"])):
                lines += [f"{'* -' if n == 0 else '  -'} {cell}" for n, cell in enumerate(row)]
            lines += [":::", "", "{.origin}", origin(about), ""]
            self.state.nested_parse(StringList(lines, ""), self.content_offset, box)
        return [box]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    note = f" ({row['note']})" if row["note"] else ""
    usual = spread(row["usual"]) if row["usual"] else ""
    ratio = row["unit"] in RATIOS
    best = row["floor"] and not ratio  # of a ratio of two measurements it says little
    floor = f"{number(row['floor'])} ({row['bound']})" if best else ""
    measured = f"{row['section']}: {row['what']}{note}"
    return measured, row["unit"].replace("%", r"\%"), spread(row["ours"]), usual, gain(row), floor


def spread(measured: dict[str, float]) -> str:
    middle = number(measured["median"])
    if measured["count"] == 1:
        return middle
    return f"{middle} ({number(measured['low'])} to {number(measured['high'])})"


def gain(row: dict[str, Any]) -> str:
    """How many times better; rates are better high, times low."""
    if not row["usual"] or row["unit"] in RATIOS:
        return ""
    better = row["ours"]["median"] / row["usual"]["median"]
    return f"{better if row['unit'].endswith('/s') else 1 / better:.1f}×"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def origin(about: dict[str, Any]) -> str:
    rates = (
        f"{about['operations_per_s'] / 1e12:.2g} TFLOP/s, {about['bytes_per_s'] / 1e9:.2g} GB/s"
    )
    return (
        f"Measured on {about['date']} with torch {about['torch']}, commit {about['commit']}, "
        f"by `make benchmarks`; what is best follows from the rates that it measured, {rates}."
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("benchmark-table", BenchmarkTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
