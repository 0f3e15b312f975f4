"""Numbers of the book from the files in results/, none of them typed by hand.

{result}`label_noise.memorising_sym40.kf`           91.3 ± 0.4, from summary.json
{result}`label_noise.memorising_sym40.kf.mean:.1f`  one number of it, with a format
{gain}`label_noise.memorising_sym40.kf.single`      +28.1, one method's mean minus another's
{finding}`label_noise.memorising_sym40.kf.single`   the same with its interval and outcome
{versus}`label_noise.memorising_sym40.kf.single`    the outcome as a verb: beats, loses to, ...
{given}`label_noise.memorising_sym40.kf.single found`  no text, unless the outcome is another: then
                                            a warning, and what it is instead
{results-table} label_noise                 a table of it
{results-table} published/aaai_table2.csv   a table of published numbers, and where they stand
"""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst.directives import unchanged_required
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from fmnlib.stats import MARGIN, OUTCOMES, interval, outcome, points, with_error

NOISE = {"sym": "symmetric", "asym": "asymmetric"}
HEADS = {"clean100": "clean (100 images)", "c100_r18": "CIFAR-100", "c100": "CIFAR-100"}
HEADS |= {"tiny_r18": "TinyImageNet", "tiny": "TinyImageNet"}
REGIMES = {"augmented": "augmented", "memorising": "without augmentation"}


def read(env: BuildEnvironment, name: str) -> Any:
    path = Path(env.srcdir, "results", name)
    env.note_dependency(str(path))
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))


def paired(terms: list[dict[str, Any]], signs: list[int]) -> tuple[float, float, float]:
    """A sum of numbers, taken seed by seed, and its 95% interval."""
    by_seed = zip(*(term["seeds"] for term in terms), strict=True)
    return interval([sum(s * x for s, x in zip(signs, row, strict=True)) for row in by_seed])


VERSUS = {"found": "beats", "opposite": "loses to", "not clear": "does not clearly differ from"}
VERSUS |= {"equal": f"is within {MARGIN} points of"}


def in_one_seed(gain: float) -> str:
    return f"is, in one seed, {abs(gain):.1f} points {'above' if gain > 0 else 'below'}"


WORDS: dict[str, Callable[[tuple[float, float, float], str], str]] = {
    "gain": lambda ends, found: points(ends[0], math.nan, math.nan),
    "finding": lambda ends, found: f"{points(*ends)}, {OUTCOMES[found]}",
    "versus": lambda ends, found: VERSUS.get(found) or in_one_seed(ends[0]),
    "given": lambda ends, found: "",
}


class Result(SphinxRole):
    """A number that leads to the notebook which computed it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        key, _, form = self.text.partition(":")
        try:
            item, setting, method, *last = key.split(".")
            (page,) = Path(self.env.srcdir, "notebooks").glob(f"[0-9]*_{item}.ipynb")
            methods = read(self.env, "summary.json")[item][setting]
            text = with_error(methods[method]) if not last else ""
            if self.name in WORDS:
                baseline, _, expected = last[0].partition(" ")
                ends = paired([methods[method], methods[baseline]], [1, -1])
                found = outcome(*ends[1:])
                text = WORDS[self.name](ends, found)
                if self.name == "given" and found != expected:
                    told = f"no longer {key}, but {found}: the sentence does not hold"
                    logging.getLogger(__name__).warning(told, location=self.get_location())
                    here = WORDS["finding"](ends, found)
                    return [nodes.strong("", f" [Does not hold in this build: {here}.]")], []
            elif last:
                text = format(methods[method][last[0]], form)
        except (OSError, LookupError, ValueError) as error:
            told = f"results/summary.json has no {self.text!r} ({error!r})"
            logging.getLogger(__name__).warning(told, location=self.get_location())
            return [nodes.Text("??")], []
        if not text:  # a link without words
            return [], []
        xref = {"refdomain": "std", "reftype": "doc", "reftarget": f"/notebooks/{page.stem}"}
        xref |= {"refdoc": self.env.docname, "refexplicit": "true", "refwarn": "true"}
        link = addnodes.pending_xref("", nodes.inline(text, text), **xref)
        return [nodes.inline("", "", link, classes=["result"], item=item)], []


class ResultsTable(SphinxDirective):
    """Methods down, settings across, the best of each column in bold."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("settings", "methods", "caption", "name"), unchanged_required
    )

    def run(self) -> list[nodes.Node]:
        box, name = nodes.container(classes=["results-table"]), self.arguments[0]
        try:
            if ".csv" in name:
                cells, source = self.published(name)
                lines = [*self.table(cells), "", source]
            else:
                summary, box["item"] = read(self.env, "summary.json")[name], name
                lines = self.table(
                    {s: {m: with_error(n) for m, n in ms.items()} for s, ms in summary.items()},
                    {s: f"{ms['single']['n']}" for s, ms in summary.items() if "single" in ms},
                )
        except (OSError, LookupError, ValueError) as error:
            raise self.error(f"results/ has no whole table of {name} ({error!r})") from error
        self.state.nested_parse(StringList(lines, ""), self.content_offset, box)
        return [box]

    def published(self, name: str) -> tuple[dict[str, dict[str, str]], str]:
        rows = read(self.env, name)
        sources = {row["file"]: row for row in read(self.env, "published/sources.csv")}
        source = "Quoted: {paper}, {table}, from {quoted_from}; reliability: {trust}."
        source = "{.origin}\n" + source.format(**sources[Path(name).name])
        return {s: {row["method"]: row[s] for row in rows} for s in rows[0]}, source

    def table(
        self, cells: dict[str, dict[str, str]], seeds: dict[str, str] | None = None
    ) -> list[str]:
        from fmnlib.plots import METHODS

        wanted = (self.options[option].split(",") for option in ("settings", "methods"))
        settings, methods = ([name.strip() for name in names] for names in wanted)
        kinds = [setting.rpartition("_")[2] for setting in settings]  # c100_sym40 or sym40
        kinds = [
            HEADS.get(setting, HEADS.get(kind, kind))
            for setting, kind in zip(settings, kinds, strict=True)
        ]
        heads = [f"{NOISE[k[:-2]]} {k[-2:]}%" if k[:-2] in NOISE else k for k in kinds]
        regimes = [setting.partition("_")[0] for setting in settings]
        if len({*regimes} & REGIMES.keys()) > 1:
            heads = [f"{h}, {REGIMES[r]}" for h, r in zip(heads, regimes, strict=True)]
        number = {s: {m: float(cells[s][m].split()[0]) for m in methods} for s in settings}
        lines = [f":::{{csv-table}} {self.options['caption']}", f":name: {self.options['name']}"]
        lines += [":header-rows: 1", ":stub-columns: 1", ":class: numbers", ""]
        lines += [",".join(["method", *(f'"{head}"' for head in heads)])]
        if seeds is not None:
            lines += [",".join(["training seeds", *(seeds[s] for s in settings)])]
        top = {s: max(number[s].values()) for s in settings}
        for m in methods:
            row = [f"**{cells[s][m]}**" if number[s][m] == top[s] else cells[s][m] for s in top]
            lines += [",".join([METHODS[m].name, *row])]
        return [*lines, ":::"]


def setup(app: Sphinx) -> dict[str, bool]:
    for name in ("result", *WORDS):
        app.add_role(name, Result())
    app.add_directive("results-table", ResultsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
