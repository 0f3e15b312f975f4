"""Run the notebooks through papermill into a staging copy, and build the book from it.

The working tree stays as it is, unless `update` asks to bring its records and outputs up to date.
The command is `fmn book`.
"""

import base64
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from book import explorer, film
from fmnlib import runs
from fmnlib.config import InputError, RunConfig
from fmnlib.files import write_whole
from fmnlib.paper.publish import collect
from fmnlib.plots import METHODS
from fmnlib.record import RunRecord
from fmnlib.stats import Summary, readable, with_error

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks", "results")
HEADLINE = """
    single early_stopping window best_probs averaged_best independent kf averaged_kf distilled_kf
""".split()
_SEEN = 0.1  # of 255, mean change of a picture's pixels from which on it keeps its colours
# What decides the outcome of a training: runs of other code are not taken for this code's.
TRAINING = """
    checkpoint config data distillation graph images losses models noise parallel plane record
    recorder step training paper/features paper/theory
""".split()


def build(
    *,
    fresh: bool = False,
    cached: bool = False,
    update: bool = False,
    rerun: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Path:
    """Run every notebook from the committed records, build the book; the path of its first page.

    Args:
        fresh: Train every network of the quick profile anew instead.
        cached: Run nothing: the committed outputs, which `make test` computes again and compares.
        update: Train anew, then bring the committed records, the notebooks' outputs and the
            published numbers of the working tree up to date.
        rerun: Run these notebooks alone, by the beginning of their names, and bring their outputs
            and numbers in the working tree up to date.
        seeds: Training seeds in place of each notebook's own; the committed records have none of
            other seeds, so that these are trained.

    Raises:
        InputError: If two of these are given, this is no checkout of the repository, another
            build is at work in it, a notebook or the build fails, or no notebook has such a name.
    """
    ways = {"fresh": fresh, "cached": cached, "update": update, "rerun": rerun, "seeds": seeds}
    if len(given := [name for name, value in ways.items() if value]) > 1:
        raise InputError(
            f"{' and '.join(given)} are given; give one of {', '.join(ways)}, or none"
        )
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are {', '.join(map(str, seeds))}; give each once")
    lock = REPOSITORY / "_build" / ".lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        with FileLock(lock).acquire(timeout=0):
            return _build(fresh, cached, update, rerun, seeds)
    except Timeout as error:
        problem = "another `fmn book` is at work in this folder"
        raise InputError(f"{problem}; wait until it is done") from error


def _build(
    fresh: bool, cached: bool, update: bool, rerun: Sequence[str], seeds: Sequence[int]
) -> Path:
    staging = stage(REPOSITORY / "_build" / "staging")
    if fresh or update or seeds:
        print(forecast(seeds), file=sys.stderr)
    # Runs of other seeds lie apart: an update commits all runs of its folder.
    fresh_runs = REPOSITORY / "runs" / f"book-{_fingerprint()}{'-seeds' if seeds else ''}"
    if update:
        with _environment(FMN_RUNS=str(fresh_runs)):
            _execute_all(staging, fresh=True)
        _commit_records(fresh_runs, runs.REFERENCE)
        staging = stage(staging)
    written: list[Path] = []
    with _environment(FMN_RUNS=str(fresh_runs)):
        if rerun:
            for notebook in _named(staging, rerun):
                execute(notebook)
        elif not cached:
            _execute_all(staging, fresh=fresh, seeds=seeds)
            for moving in (explorer, film):  # of runs that the notebooks made
                written += moving.write(staging, seed=seeds[0] if seeds else 0, fresh=fresh)
    gather(staging)
    if update or rerun:  # what this build wrote and nothing else, which may have changed meanwhile
        results = staging / "results"
        written += _named(staging, rerun) if rerun else _notebooks(staging)
        written += [results / "summary.json", results / "provenance.json"]
        written += (results / "figures").glob("*")
        for path in written:
            write_whole(REPOSITORY / path.relative_to(staging), path.read_bytes())
        summary = json.loads((results / "summary.json").read_text())
        readme = REPOSITORY / "README.md"
        write_whole(readme, readme_with(summary, readme.read_text()).encode())
    return render(staging, REPOSITORY, strict=not seeds)


def forecast(seeds: Sequence[int] = ()) -> str:
    """How long it takes to train the networks of the quick profile here, from a short training.

    As many as there are cores are trained side by side, for a sixth of their epochs. Of other
    seeds there will be as many networks for each as are committed for one on average.
    """
    committed = [RunRecord.load(path) for path in sorted(runs.REFERENCE.glob("*.npz"))]
    known_seeds = {r.config.noise_seed for r in committed if r.config is not None}
    share = len(set(seeds) - known_seeds) / len(known_seeds) if seeds else 1
    if not share:
        return "these seeds are committed; networks that some notebook lacks are trained"
    seconds = share * sum(float(record.provenance["seconds"]) for record in committed)
    config = RunConfig.of_profile("quick")
    known = next(record for record in committed if record.config == config)
    devices, part = runs.local_devices("auto"), known.epochs // 6
    some = [dataclasses.replace(config, epochs=part, seed=n) for n in range(len(devices))]
    with tempfile.TemporaryDirectory() as folder, _environment(FMN_RUNS=folder):
        made = runs.obtain(some, fresh=True, progress=False)
    here = np.mean([float(r.provenance["seconds"]) for r in made]) / part
    there = float(known.provenance["seconds"]) / known.epochs
    minutes = seconds * here / there / len(devices) / 60
    about = f"{len(committed)} networks, as many as are committed"
    if seeds:
        about = f"about {share * len(committed):.0f} networks"
    return f"training {about}, {len(devices)} at a time: about {minutes:.0f} minutes"


def stage(staging: Path) -> Path:
    """Copy the book's sources into an empty folder."""
    if not (REPOSITORY / "_toc.yml").exists():
        raise InputError(f"{REPOSITORY.name} holds no book; run from a clone of the repository")
    shutil.rmtree(staging, ignore_errors=True)
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            skip = shutil.ignore_patterns("reference", ".ipynb_checkpoints", "__pycache__")
            shutil.copytree(source, staging / name, ignore=skip)
        else:
            staging.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, staging)
    return staging


def execute(notebook: Path, **parameters: object) -> None:
    """Run a notebook in place; parameters that it does not have are an error.

    `fresh=False` is every notebook's default, and not injected.
    """
    import papermill

    given = {
        name: value for name, value in parameters.items() if (name, value) != ("fresh", False)
    }
    known = papermill.inspect_notebook(notebook)
    if unknown := set(given) - set(known):
        has = ", ".join(known)
        raise InputError(f"{notebook.name} has no parameter {min(unknown)!r}; it has {has}")
    try:
        done = papermill.execute_notebook(
            notebook,
            None,
            given,
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar={"desc": notebook.stem},
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # no word of unencrypted local ports
        )
    except papermill.PapermillExecutionError as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(f"{notebook.name} failed in cell {error.exec_count}: {last}") from error
    write_whole(notebook, _clean(done).encode())


def gather(staging: Path) -> None:
    """Write the staging copy's published numbers, their origins and the pictures for the prose."""
    summary: dict[str, Any] = {}
    origins: dict[str, Any] = {}
    for path in _notebooks(staging):
        notebook = json.loads(path.read_text())
        figures = []
        for cell in notebook["cells"]:
            name = cell["metadata"].get("fmnlib", {}).get("save_figure")
            for output in cell.get("outputs", []) if name else []:
                if picture := output.get("data", {}).get("image/png"):
                    write_whole(staging / "results" / "figures" / name, base64.b64decode(picture))
                    figures.append(name)
        for published in collect(notebook):
            summary[published["item"]] = published["summary"]
            about = {"notebook": path.stem, "figures": figures} | published["origin"]
            origins[published["item"]] = about
    for file, content in (("summary", summary), ("provenance", origins)):
        text = json.dumps(content, indent=1) + "\n"
        write_whole(staging / "results" / f"{file}.json", text.encode())


def headline(summary: Mapping[str, Summary]) -> str:
    """The README's table: accuracy of the main methods with augmentation, from the summary."""
    by_setting = {
        f"{data}, {readable(setting.partition('_')[2])}": numbers
        for data, item in (("CIFAR-100", "cifar100"), ("digits", "label_noise"))
        for setting, numbers in summary[item].items()
        if setting.startswith("augmented") and set(HEADLINE) <= set(numbers)
    }
    lines = ["| test accuracy, % | " + " | ".join(by_setting) + " |"]
    lines.append("|---" * (len(by_setting) + 1) + "|")
    for method in HEADLINE:
        cells = [with_error(numbers[method]) for numbers in by_setting.values()]
        lines.append(f"| {METHODS[method].name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme_with(summary: Mapping[str, Summary], readme: str) -> str:
    """The README with its table, which stands between two marks, brought up to date."""
    before, start, rest = readme.partition("<!-- headline -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (start and end):
        raise InputError(
            "README.md lacks its marks, <!-- headline --> and <!-- end -->; put them back"
        )
    return f"{before}{start}{headline(summary)}\n{end}{after}"


def render(staging: Path, output: Path, *, strict: bool = True) -> Path:
    """Build the HTML; return the path of the first page.

    A warning is an error, unless the numbers are not those that the sentences were written for:
    each of these that does not hold then says so on its page, and is listed.
    """
    start = "from jupyter_book.cli.main import main; main()"  # the one of this environment
    command = [sys.executable, "-c", start, "build", str(staging)]
    command += ["--path-output", str(output), "--all", "-n", "--keep-going", "--quiet"]
    command += ["-W"] if strict else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    index = output / "_build" / "html" / "index.html"
    failed = done.returncode or not index.exists()
    if failed or not strict:
        print(done.stdout, file=sys.stderr)
    if failed:
        raise InputError("the book does not build; the lines above say why")
    return index


def _execute_all(staging: Path, *, fresh: bool, seeds: Sequence[int] = ()) -> None:
    import papermill

    for notebook in _notebooks(staging):
        known = papermill.inspect_notebook(notebook)
        if "results" in known:  # of a grid, whose runs take hours
            execute(notebook)
        else:
            own: dict[str, object] = {}
            if seeds:
                own = {"seeds": list(seeds)} if "seeds" in known else {"seed": seeds[0]}
            execute(notebook, fresh=fresh, **own)


def _clean(notebook: Any) -> str:
    """A notebook as text without what differs from run to run: timings, paths, progress bars."""
    notebook["metadata"].pop("papermill", None)
    notebook["metadata"].pop("widgets", None)  # for them a page would ask another host for scripts
    notebook["metadata"].get("language_info", {}).pop("version", None)
    for cell in notebook["cells"]:
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["id"] = "injected-parameters"
            cell["metadata"]["tags"].append("hide-input")
            cell["metadata"]["mystnb"] = {"code_prompt_show": "Parameters of this run"}
        if cell["cell_type"] == "code":
            kept = [o for o in cell["outputs"] if o.get("name") != "stderr"]
            kept = [o for o in kept if "widget-view" not in str(o.get("data", {}).keys())]
            cell["outputs"] = []
            for output in kept:  # a stream comes in pieces, other ones each time
                last = cell["outputs"][-1] if cell["outputs"] else {}
                if output["output_type"] == last.get("output_type") == "stream":
                    last["text"] += output["text"]
                else:
                    cell["outputs"].append(output)
            for data in (output.get("data", {}) for output in cell["outputs"]):
                if picture := data.get("image/png"):
                    small = with_few_colours(base64.b64decode(picture))
                    data["image/png"] = base64.b64encode(small).decode()
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def with_few_colours(png: bytes) -> bytes:
    """An opaque picture in 256 colours, a third as large; itself where one would see that."""
    with Image.open(io.BytesIO(png)) as image:
        resolution, full = image.info.get("dpi", (72, 72)), image.convert("RGBA")
    if np.asarray(full)[..., 3].min() < 255:
        return png
    plain = full.convert("RGB")
    few = plain.quantize(256, dither=Image.Dither.NONE)
    changed = np.asarray(few.convert("RGB"), int) - np.asarray(plain, int)
    if np.abs(changed).mean() > _SEEN:
        return png
    few.save(buffer := io.BytesIO(), "PNG", optimize=True, dpi=resolution)
    return min(buffer.getvalue(), png, key=len)


def _commit_records(source: Path, target: Path) -> None:
    """Copy the records of all runs to the committed ones, and drop those that no run made."""
    made = {path.parent.name: path.parent for path in source.glob("*/record.npz")}
    for name, folder in made.items():
        record = RunRecord.load(folder)
        student = record.config is not None and bool(record.config.teacher)
        if student and record.kept.tolist() == [record.epochs - 1]:
            record = record.final()  # nobody asks how a student came there
        record.save(target / f"{name}.npz", compress=True)
    for path in target.glob("*.npz"):
        if path.stem not in made:
            path.unlink()


def _notebooks(staging: Path) -> list[Path]:
    return sorted((staging / "notebooks").glob("*.ipynb"))


def _named(staging: Path, beginnings: Sequence[str]) -> list[Path]:
    every = _notebooks(staging)
    for name in beginnings:
        if not any(path.stem.startswith(name) for path in every):
            raise InputError(
                f"no notebook begins with {name!r}; there are {every[0].stem} to {every[-1].stem}"
            )
    return [path for path in every if path.stem.startswith(tuple(beginnings))]


def _fingerprint() -> str:
    """A digest of all that decides the outcome of the book's runs: library and notebooks."""
    digest = hashlib.sha256()
    for module in TRAINING:
        digest.update((REPOSITORY / "fmnlib" / f"{module}.py").read_bytes())
    for path in _notebooks(REPOSITORY):
        cells = json.loads(path.read_text())["cells"]
        code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        digest.update(json.dumps(code).encode())
    return digest.hexdigest()[:8]


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
