"""{grid-table} cpu: what a grid of runs has measured, cell by cell, from results/cpu/results.json.

It shows the cells that are measured, and the papers' numbers of the same cell below them; a grid
without any is one sentence.
"""

from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst.directives import unchanged_required
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fmnlib.record import Result, RunRecord
from fmnlib.scores import forget_fraction
from fmnlib.stats import (
    Numbers,
    paired_difference,
    percent,
    points,
    readable,
    summarize,
    with_error,
)
from results import read

NAMES = {"fashion_mnist": "Fashion-MNIST", "cifar100": "CIFAR-100", "resnet8": "ResNet-8"}
NAMES |= {"none": "memorising", "crop_flip": "augmented"}
PAIRS = [("kf", m) for m in ("single", "early_stopping", "window", "averaged_best", "independent")]
PAIRS += [("distilled_kf", m) for m in ("single", "averaged_best", "independent")]
METHODS = """
    single early_stopping window best_probs averaged_best uniform horizontal fixed_jumps knn
    independent kf averaged_kf distilled_kf
""".split()


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
        content = read(self.env, name)["cells"] if there else {}
        columns: dict[tuple[str, ...], list[str]] = {}
        for cell in cells(self.arguments[0]):
            if not cell.wider:
                c = cell.config
                columns.setdefault((c.dataset, c.model, c.augment, c.setting), []).append(cell.id)
        columns = {key: [i for i in ids if i in content] for key, ids in columns.items()}
        columns = {key: ids for key, ids in columns.items() if ids}
        if not columns:
            return self.parse_text_to_nodes("No cell of this grid is measured yet.")
        rows_of = {
            key: shared([scored(content[i]["results"], key[-1]) for i in ids])
            for key, ids in columns.items()
        }
        heads, scores = headings(list(columns)), [summary(rows) for rows in rows_of.values()]
        rows = {"training seeds": [f"{s['single']['n']:.0f}" if s else "0" for s in scores]}
        rows["largest forget fraction, %"] = [
            with_error(self.forgotten(ids)) if ids else "—" for ids in columns.values()
        ]
        for method in METHODS:
            row = [with_error(s[method]) if method in s else "—" for s in scores]
            rows[LOOKS[method].name] = row
        for method, baseline in PAIRS:
            name = f"{LOOKS[method].name} minus {LOOKS[baseline].name}"
            rows[name] = [
                gain(results, method, baseline) if {method, baseline} <= s.keys() else "—"
                for results, s in zip(rows_of.values(), scores, strict=True)
            ]
        rows = {name: row for name, row in rows.items() if {*row} != {"—"}}
        for method in ("single", "kf") if "published" in self.options else ():
            row = [self.published(method, key[-1]) for key in columns]
            rows[f"{LOOKS[method].name}, published"] = row
        lines = [f":::{{csv-table}} {self.options['caption']}", f":name: {self.options['name']}"]
        lines += [":header-rows: 1", ":stub-columns: 1", ":class: numbers", ""]
        lines += [",".join(["method", *heads])]
        lines += [",".join([f'"{name}"', *row]) for name, row in rows.items()]
        box = nodes.container(classes=["results-table"])
        lines += [
            ":::",
            "",
            self.origin([content[i]["provenance"] for ids in columns.values() for i in ids]),
        ]
        self.state.nested_parse(StringList(lines, ""), self.content_offset, box)
        return [box]

    def forgotten(self, ids: list[str]) -> Numbers:
        """The largest F_e of each run of a column on the half that is scored."""
        records = Path(self.env.srcdir, "results", self.options["results"], "records")
        loaded = [RunRecord.load(records / f"{i}.npz") for i in ids]
        scored_halves = [record.split(0)[1] for record in loaded]
        return percent([forget_fraction(half.correct).max() for half in scored_halves])

    def published(self, method: str, setting: str) -> str:
        key = "c100_r18" if setting == "clean" else f"c100_{setting}"
        for name in self.options["published"].split():
            rows = {row["method"]: row for row in read(self.env, name)}
            if number := rows[method].get(key):
                return str(number)
        return "—"

    def origin(self, provenance: list[dict[str, Any]]) -> str:
        told = {
            key: sorted({str(p[key]) for p in provenance}) for key in ("device", "torch", "commit")
        }
        return (
            f"{{.origin}}\nMeasured on {', '.join(told['device'])} with torch "
            f"{', '.join(told['torch'])}, commit {', '.join(told['commit'])}: "
            f"{len(provenance)} runs and what is made from them."
        )


def headings(columns: list[tuple[str, ...]]) -> list[str]:
    """Of each column the noise, and what is not the same in all of them.

    >>> headings([("cifar100", "resnet18", "none", s) for s in ("clean", "sym40")])
    ['clean', '40% symmetric']
    """
    varying = [part for part in range(3) if len({key[part] for key in columns}) > 1] + [3]
    named = [[*(NAMES.get(part, part) for part in key[:3]), readable(key[3])] for key in columns]
    return [" ".join(key[part] for part in varying) for key in named]


def scored(rows: list[dict[str, Any]], setting: str) -> list[Result]:
    """The results of a cell; those of other versions name its setting otherwise."""
    return [Result(**row | {"setting": setting}) for row in rows]


def shared(cells: list[list[Result]]) -> list[Result]:
    """The results of the methods that every one of some cells has."""
    common = set.intersection(*({result.method for result in cell} for cell in cells))
    return [result for cell in cells for result in cell if result.method in common]


def summary(results: list[Result]) -> dict[str, Numbers]:
    return summarize(results)[results[0].setting]


def gain(results: list[Result], method: str, baseline: str) -> str:
    """The mean difference in points, with its interval where there is more than one seed."""
    return f'"{points(*paired_difference(results, results[0].setting, method, baseline))}"'


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("grid-table", GridTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
