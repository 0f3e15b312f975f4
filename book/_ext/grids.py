"""{grid-table} cpu: what a grid of runs has measured, cell by cell, from results/cpu/results.json.

A cell that no machine has measured has a dash; the papers' numbers of the same cell stand below.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst.directives import unchanged_required
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fmnlib.record import Result, RunRecord
from fmnlib.scores import forget_fraction
from fmnlib.stats import Numbers, paired_difference, percent, points, summarize, with_error
from results import read

NAMES = {"fashion_mnist": "Fashion-MNIST", "cifar100": "CIFAR-100", "resnet8": "ResNet-8"}
PAIRS = [("kf", "single"), ("distilled_kf", "single"), ("kf", "independent")]
METHODS = "single early_stopping independent kf averaged_kf distilled_kf".split()


class GridTable(SphinxDirective):
    """Methods down, cells across."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("results", "caption", "name", "published"), unchanged_required
    )

    def run(self) -> list[nodes.Node]:
        from fmnlib.paper.grid import cells
        from fmnlib.plots import METHODS as LOOKS

        name = f"{self.options['results']}/results.json"
        there = Path(self.env.srcdir, "results", name).exists()
        content = list(read(self.env, name)["cells"].values()) if there else []
        found = measured(row for cell in content for row in cell["results"])
        configs = [cell.config for cell in cells(self.arguments[0]) if not cell.wider]
        wanted = dict.fromkeys((f"{c.dataset}-{c.model}", c.setting) for c in configs)
        scores = [summary(found.get(cell, [])) for cell in wanted]
        several = len({item for item, _ in wanted}) > 1
        heads = [named(item) if several else setting for item, setting in wanted]
        rows = {"training seeds": [f"{s['single']['n']:.0f}" if s else "0" for s in scores]}
        rows["largest forget fraction, %"] = [
            with_error(self.forgotten(cell)) if cell in found else "—" for cell in wanted
        ]
        for method in METHODS:
            row = [with_error(s[method]) if s else "—" for s in scores]
            rows[LOOKS[method].name] = row
        for method, baseline in PAIRS:
            name = f"{LOOKS[method].name} less {LOOKS[baseline].name}"
            rows[name] = [gain(found.get(cell, []), method, baseline) for cell in wanted]
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

    def forgotten(self, cell: tuple[str, str]) -> Numbers:
        """The largest F_e of each run of a cell, from its light record."""
        (dataset, model), setting = cell[0].split("-"), cell[1]
        records = Path(self.env.srcdir, "results", self.options["results"], "records")
        files = sorted(records.glob(f"{dataset}-{model}-{setting}-s*.npz"))
        return percent([forget_fraction(RunRecord.load(f).correct).max() for f in files])

    def published(self, method: str, setting: str) -> str:
        key = "c100_r18" if setting == "clean" else f"c100_{setting}"
        for name in self.options["published"].split():
            rows = {row["method"]: row for row in read(self.env, name)}
            if number := rows[method].get(key):
                return str(number)
        return "—"

    def origin(self, provenance: list[dict[str, Any]]) -> str:
        if not provenance:
            return "{.origin}\nCells with a dash are not measured here, or not given there."
        told = {
            key: sorted({str(p[key]) for p in provenance}) for key in ("device", "torch", "commit")
        }
        return (
            f"{{.origin}}\nMeasured on {', '.join(told['device'])} with torch "
            f"{', '.join(told['torch'])}, commit {', '.join(told['commit'])}: "
            f"{len(provenance)} runs and what is made from them. A dash: not measured."
        )


def measured(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[Result]]:
    """Scores by data set with network, and by noise."""
    found: dict[tuple[str, str], list[Result]] = {}
    for row in rows:
        found.setdefault((row["item"], row["setting"]), []).append(Result(**row))
    return found


def named(item: str) -> str:
    return " ".join(NAMES.get(word, word) for word in item.split("-"))


def summary(results: list[Result]) -> dict[str, Numbers]:
    return summarize(results)[results[0].setting] if results else {}


def gain(results: list[Result], method: str, baseline: str) -> str:
    """The mean difference in points, with its interval where there is more than one seed."""
    if not results:
        return "—"
    return f'"{points(*paired_difference(results, results[0].setting, method, baseline))}"'


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("grid-table", GridTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
