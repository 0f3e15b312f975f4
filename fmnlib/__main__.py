"""The command `fmn`: train, diagnose, fuse and distil runs, and build the book."""

import dataclasses
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from cyclopts import App, CycloptsError, Parameter

from fmnlib import __version__, scores
from fmnlib.config import (
    SOFT_SHARES,
    CheckpointFiles,
    InputError,
    Paused,
    RunConfig,
    StudentConfig,
)
from fmnlib.files import refuse_existing, write_whole
from fmnlib.fusion import (
    Fusion,
    accuracy,
    best_epochs,
    early_stopping_window,
    knowledge_fusion,
    single,
)
from fmnlib.record import RunRecord
from fmnlib.stats import Interval, gain_rows, gains, picks
from fmnlib.tracker import is_tracked, load_tracked

if TYPE_CHECKING:
    from fmnlib.labels import TrainingSamples

app = App(
    name="fmn",
    version=__version__,
    help="Measure what a network forgets while it trains, fuse it back, distil it into one.",
    suppress_keyboard_interrupt=False,
    # The settings of students are options of `fmn distill`.
    default_parameter=Parameter(
        consume_multiple=True, negative_iterable="", parse=re.compile(r"^(?!student$)")
    ),
)
Flags = Annotated[RunConfig, Parameter(name="*")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Device = Annotated[str, Parameter(help="cpu, cuda, or auto for a GPU if there is one.")]
Minutes = Annotated[float, Parameter(help="Stop after the last epoch that ends within this time.")]
_QUICK = RunConfig()
_NO_FILES = CheckpointFiles()


@app.command(name="train")
def train_run(
    config: Flags = _QUICK,
    *,
    device: Device = "auto",
    max_minutes: Minutes = math.inf,
    as_json: Json = False,
) -> None:
    """Train one network and record its predictions after every epoch.

    The run is stored in runs/ (or the folder FMN_RUNS), under a name derived from its settings. A
    run that was stopped is resumed; a complete one is only read.
    """
    from fmnlib import runs
    from fmnlib.training import train

    deadline = _deadline(max_minutes)
    record = train(config, runs.folder(config), device=device, deadline=deadline)
    _show({"run": config.id} | _overview(record), as_json)


@app.command(name="diagnose")
def diagnose_run(
    run: str, *, split: int = 0, html: Path | None = None, as_json: Json = False
) -> None:
    """Diagnose a run: what is worth doing, whether it overfits, where, and since when.

    The diagnosis uses the validation half only; intervals are 95% intervals over its samples.

    Args:
        run: Folder of a run or of a Tracker, the beginning of a run's name, or a record's .npz
            file.
        split: Seed of the split into validation and test half.
        html: File to write the diagnosis to, as one page with figures.
    """
    from fmnlib.diagnosis import diagnose

    if html is not None and html.is_dir():
        raise InputError(f"html is {html}, a folder; give the name of a file, such as report.html")
    record = _load(run)
    diagnosis = diagnose(record, split=split)
    if html is not None:
        from fmnlib.report import page

        val = record.split(split)[0] if record.half == "all" else record
        fusion = None if val.probs is None else _anchored(val)
        title = f"What {Path(run).name} forgot"
        write_whole(html, page(val, diagnosis, fusion, title=title).encode("utf-8", "replace"))
    overview = _overview(record)
    if as_json:
        print(json.dumps(overview | {"diagnosis": diagnosis.summary()}))
        return
    _show({f"{name}, all samples": value for name, value in overview.items()}, as_json)
    print("", diagnosis, sep="\n")
    if files := record.provenance.get("checkpoints"):
        epochs = dict.fromkeys((diagnosis.epoch, diagnosis.around, diagnosis.early_epoch))
        print(*(f"Epoch {epoch} is {files[epoch]}." for epoch in epochs))


@app.command
def fuse(
    run: str = "",
    *,
    files: Annotated[CheckpointFiles, Parameter(name="*")] = _NO_FILES,
    split: int = 0,
    mix: Literal["kf", "best", "window"] = "kf",
    start: Literal["best", "final"] = "best",
    window: int | None = None,
    max_picks: int | None = None,
    grid: bool = False,
    as_json: Json = False,
) -> None:
    """Find the forgotten epochs of a run and mix them in (Knowledge Fusion).

    The fusion is chosen on one half of the evaluation data and measured on the other; intervals
    are Tango's 95% score intervals over its samples. For a run, the fusion is written to
    fusion.json in its folder. For other checkpoints (--checkpoints, --model, --data), and for a
    Tracker's folder with --model, one network is written, which loads without fmnlib.

    Args:
        run: Folder of a run or of a Tracker, the beginning of a run's name, or a record's .npz
            file.
        split: Seed of the split into validation and test half.
        mix: Epochs to mix: those of Knowledge Fusion (kf), the five with the best accuracy (best),
            or as many as Knowledge Fusion takes, around early stopping's epoch (window).
        start: The network that Knowledge Fusion adds to: that of the best validation accuracy, or
            the final one, as in the papers.
        window: Epochs averaged on either side of a pick; 1, or 0 where there are fewer than three,
            if not given. With few checkpoints 0 may be better.
        max_picks: Stop after this many picks; 1 is the papers' "(i)".
        grid: Choose shares on the papers' grid of 0.01 instead of exactly.
    """
    if bool(run) == bool(files.checkpoints):
        options = "--checkpoints 'ckpt/*.pt' --model NAME --data FOLDER, the pattern in quotes"
        raise InputError(f"give a run, or {options}")
    if run and files != _NO_FILES and not (files.model and is_tracked(run)):
        problem = f"{run!r} is given with --model, --data or the like"
        raise InputError(f"{problem}; they go with --checkpoints, --model with a tracked folder")
    if mix == "best" and (start, window, max_picks, grid) != ("best", None, None, False):
        problem = "--mix best takes the epochs of best accuracy, whatever Knowledge Fusion finds"
        raise InputError(f"{problem}; leave out --start, --window, --max-picks and --grid")
    shares = np.arange(0, 1.005, 0.01) if grid else None

    def search(val: RunRecord) -> Fusion:
        if mix == "best":
            return best_epochs(val)
        fusion = knowledge_fusion(
            val, window=window, max_picks=max_picks, grid=shares, start=start
        )
        return fusion if mix == "kf" else early_stopping_window(val, fusion.networks)

    if files.model or files.checkpoints:
        from fmnlib.external import fuse_files

        tracked = Path(run) if run else None
        _show(fuse_files(files, search, split, tracked) | {"split": split}, as_json)
        return
    record = _load(run)
    val, test = record.split(split)
    fusion = search(val)
    written = {}
    if folder := _find_folder(run):
        dataclasses.replace(fusion, split=split).save(folder / "fusion.json")
        written["written"] = str(folder / "fusion.json")
    # The epochs of imported checkpoints are named after their files.
    names = record.provenance.get("checkpoints") or [f"epoch {e}" for e in range(record.epochs)]
    rows = gain_rows(gains(val, test, fusion)) | picks(fusion, names)
    _show(rows | {"networks": fusion.networks, "split": split} | written, as_json)


@app.command(name="distill")
def distill_run(
    run: str,
    *,
    split: int | None = None,
    temperature: float = StudentConfig.temperature,
    labels: Literal["given", "refined"] = "given",
    soft_share: float | None = None,
    teacher_views: int = 0,
    device: Device = "auto",
    max_minutes: Minutes = math.inf,
    as_json: Json = False,
) -> None:
    """Distil the fusion of a run into one network of the original size.

    Takes the fusion that `fmn fuse` wrote, or finds one in the same way.

    Args:
        run: Folder of a run, or the beginning of its name.
        split: Seed of the split into validation and test half; by default that of the fusion.
        temperature: Temperature of the softmax of teacher and student.
        labels: given, the labels of the data; or refined, the class that the teacher predicts for
            each image, for data with many wrong labels.
        soft_share: Weight of the teacher's term; the labels' term has the rest. If not given, 0.9
            with given labels and 0.5 with refined ones.
        teacher_views: Augmented views per image to predict in advance; 0 predicts while training.
    """
    from fmnlib.distillation import distill, members_of, student_config

    folder, record = _find_folder(run), _load(run)
    if folder is None or record.config is None:
        given = run if folder is not None else "--checkpoints 'ckpt/*.pt'"
        remedy = f"`fmn fuse {given} --model NAME --network distilled --train DATA` does it"
        raise InputError(f"{run} has no checkpoints of `fmn train`; {remedy}")
    if teacher_views and record.config.augment == "none":
        problem = f"--teacher-views {teacher_views} is for augmented views, and {run} has none"
        raise InputError(f"{problem}; leave it out")
    fusion, split = _fusion_of(folder, record, split)
    test = record.split(split)[1]
    members = members_of(record.config, folder, fusion)
    share = SOFT_SHARES[labels] if soft_share is None else soft_share
    loss = {"temperature": temperature, "soft_share": share, "labels": labels}
    config = student_config(record.config, "kf", members, **loss, teacher_views=teacher_views)
    path, deadline = folder.resolve().parent / config.id, _deadline(max_minutes)
    student = distill(config, members, path, device=device, deadline=deadline)
    accuracies = {
        "test accuracy, single": accuracy(test, single(test)),
        f"test accuracy, {fusion.networks} networks fused": accuracy(test, fusion),
        "test accuracy, student": accuracy(student.split(split)[1], single(student)),
    }
    _show({"student": config.id} | accuracies | {"split": split}, as_json)


@app.command(name="labels")
def rank_labels(
    run: str = "",
    *,
    files: Annotated[CheckpointFiles, Parameter(name="*")] = _NO_FILES,
    csv: Path = Path("labels.csv"),
    html: Path | None = None,
    split: int | None = None,
    as_json: Json = False,
) -> None:
    """Rank training labels: which are probably wrong, and what they should be.

    The mixture that `fmn fuse` wrote (or Knowledge Fusion, if there is none) predicts the training
    samples once, without augmentation. The score of a label is the margin by which the strongest
    other class is ahead of it; the share of scores above 0 estimates the noise rate.

    For a Tracker's folder, --train is the folder of a second Tracker, with the outputs for the
    training samples after the same epochs. With --model (and for other checkpoints: --checkpoints,
    --model, --data), --train is the training samples themselves.

    Args:
        run: Folder of a run or of a Tracker, or the beginning of a run's name.
        csv: File for the ranking: index, file, given, suggested, score.
        html: File for a page of the most suspicious images.
        split: Seed of the split into validation and test half; by default that of the fusion.
    """
    from fmnlib import labels

    for path in filter(None, (csv, html)):
        refuse_existing(path)
    if html is not None and html.resolve() == csv.resolve():
        raise InputError(f"csv and html are both {html}; give two names")
    samples, fusion = _training_samples(run, files, split)
    names: Any = {"files": samples.files, "classes": samples.classes}
    table = labels.suspects(samples.probs, samples.given, **names)
    write_whole(csv, table.to_csv(index=False).encode("utf-8", "surrogateescape"))
    if html is not None:
        if samples.images is None:
            raise InputError(f"html is for images, which these samples are not; {csv} is written")
        title = f"Labels of {Path(run or files.train or '').name} that look wrong"
        write_whole(html, labels.page(samples, table, title=title).encode("utf-8", "replace"))
    rows: dict[str, Any] = {"samples": len(table), "networks": fusion.networks}
    rows["estimated noise rate"] = labels.noise_rate(table)
    if samples.wrong is not None and (found := labels.detection(table, samples.wrong)):
        rows |= {"true noise rate": float(samples.wrong.mean())} | found
    _show(rows | {"written": ", ".join(map(str, filter(None, (csv, html))))}, as_json)


@app.command(name="runs")
def list_runs(*, as_json: Json = False) -> None:
    """List the runs there are."""
    from fmnlib import runs

    rows = runs.listing()
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print(f"no runs in {runs.root()}; `fmn train` makes one")
    for row in rows:
        accuracy = f"{row['accuracy']:.1%}" if "accuracy" in row else ""
        epochs = f"{row['epochs']} epochs" if "epochs" in row else ""
        print(f"{row['run']:<60} {epochs:>11}  {row['state']:<10} {accuracy}")


@app.command(name="grid")
def grid_of_runs(
    name: str,
    *,
    status: bool = False,
    out: Path | None = None,
    max_minutes: Minutes = math.inf,
    workers: int | None = None,
    device: Device = "auto",
    engine: Literal["local", "ray"] = "local",
    gpus_per_run: float | None = None,
    address: str | None = None,
    as_json: Json = False,
) -> None:
    """Work through a grid of runs, most informative first; what was stopped is resumed.

    Args:
        name: paper (CIFAR-100, ResNet-18: the papers' tables), cifar (the same at a quarter of the
            width, for CPU cores) or cpu (smaller networks).
        status: Only say what is done, running and left.
        out: Write scores and light records of the complete cells into this folder; cells that it
            holds already are not trained again.
        workers: Number of concurrent runs; by default one per core, or per GPU.
        engine: local is this machine, with all its GPUs; ray a cluster whose machines share
            FMN_RUNS and FMN_DATA.
        gpus_per_run: The share of a GPU that a run takes on Ray, such as 0.5.
        address: Address of the Ray cluster, such as auto; by default RAY_ADDRESS or this machine.
    """
    from fmnlib import runs
    from fmnlib.paper import grid

    local, ray = {"workers": workers}, {"gpus_per_run": gpus_per_run, "address": address}
    options, others = (ray, local) if engine == "ray" else (local, ray)
    for option in (name for name, value in others.items() if value is not None):
        raise InputError(f"{option} is not for the engine {engine}; leave it out")
    cells = grid.cells(name)
    written = grid.published(out) if out is not None else {}
    published = {name for name, cell in written.items() if cell.get("whole", True)}
    try:
        if not status:
            todo = [cell for cell in cells if cell.id not in published]
            make = runs.make_on_ray if engine == "ray" else runs.make_all
            grid.work(todo, make=make, device=device, deadline=_deadline(max_minutes), **options)
    finally:
        rows = grid.status(cells, published)
        if out is not None and not status:
            grid.publish(cells, out)
        if as_json:
            print(json.dumps(rows))
        for row in [] if as_json else rows:
            seconds = f"{row['seconds']:8.0f} s" if "seconds" in row else ""
            print(f"{row['network']:<64} {row['state']:<10}{seconds}")


@app.command
def book(
    *,
    fresh: bool = False,
    cached: bool = False,
    update: bool = False,
    rerun: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    as_json: Json = False,
) -> None:
    """Run every notebook from the committed records, build the book; print its first page.

    Args:
        fresh: Train every small network anew instead; say first how long that takes.
        cached: Build it from the committed outputs, and run nothing.
        update: Train anew, and bring the committed records, outputs and numbers up to date.
        rerun: Run these notebooks alone, such as 05, and bring their outputs up to date.
        seeds: Training seeds of every notebook in place of its own, to see what holds for others.
    """
    root = Path(__file__).parents[1]
    if not (root / "book" / "build.py").exists():
        raise InputError("there is no book here; run from a clone of the repository")
    sys.path.insert(0, str(root))
    build = importlib.import_module("book.build").build
    page = str(build(fresh=fresh, cached=cached, update=update, rerun=rerun, seeds=seeds))
    print(json.dumps({"page": page}) if as_json else page)


@app.command
def download(dataset: str, *, as_json: Json = False) -> None:
    """Fetch a data set by torchvision into data/ (or where FMN_DATA says).

    Args:
        dataset: mnist, fashion_mnist, cifar10 or cifar100.
    """
    from fmnlib import data

    folder = str(data.download(dataset))
    print(json.dumps({"folder": folder}) if as_json else folder)


def main() -> None:
    """Run the command; bad input ends in one line on standard error and exit code 2."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except Paused as pause:
        print(f"fmn: {pause}", file=sys.stderr)
    except (InputError, CycloptsError) as error:
        print("fmn:", _printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, no permission
        remedy = "what was written stays; fix that and give the same command again"
        print(f"fmn: {error}; {remedy}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        kinds = ("OutOfMemoryError", "AcceleratorError", "MemoryError")
        if not re.search("CUDA|allocate memory", str(error)) and type(error).__name__ not in kinds:
            raise
        failed = "the GPU failed" if "CUDA" in str(error) else "memory ran out"
        first = str(error).partition("\n")[0]
        print(f"fmn: {failed} ({first}); the same command resumes it", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fmn: stopped; the same command again resumes a run", file=sys.stderr)
        sys.exit(130)


def _deadline(minutes: float) -> float:
    if math.isnan(minutes):
        raise InputError("max_minutes is nan; give a number of minutes")
    return time.monotonic() + 60 * minutes


def _fusion_of(folder: Path, record: RunRecord, split: int | None) -> tuple[Fusion, int]:
    """The fusion that `fmn fuse` wrote, or one found in the same way, and its split's seed."""
    file = folder / "fusion.json"
    if not file.exists():
        return _anchored(record.split(split or 0)[0]), split or 0
    fusion = Fusion.load(file)
    if None not in (fusion.split, split) and fusion.split != split:  # chosen on test samples
        problem = f"the fusion was chosen on split {fusion.split} and split is {split}"
        raise InputError(f"{problem}; leave out --split, or `fmn fuse --split {split}` first")
    return fusion, (fusion.split if split is None else split) or 0


def _training_samples(
    run: str, files: CheckpointFiles, split: int | None
) -> tuple["TrainingSamples", Fusion]:
    """A mixture's predictions for the training samples, and the mixture."""
    from fmnlib import labels

    if bool(run) == bool(files.checkpoints) or not (run or files.model):
        options = "--checkpoints 'ckpt/*.pt' --model NAME --data FOLDER --train FOLDER"
        raise InputError(f"give a run, or {options}")
    unused = {"network", "labels", "output", "epochs", "lr", "save_record"}
    unused |= {"device"} if files.train is not None and not files.model else set()
    if not files.model:
        unused |= {"data", "weights", "size", "resize", "mean", "std"}
    given = [name for name in sorted(unused) if getattr(files, name) != getattr(_NO_FILES, name)]
    if given:
        option = given[0].replace("_", "-")
        raise InputError(f"--{option} has no use in this `fmn labels`; leave it out")
    if files.model:
        from fmnlib.external import mixture_on_training

        if not run:
            return mixture_on_training(files, _anchored, split or 0)
        fusion, split = _fusion_of(Path(run), _load(run), split)
        return mixture_on_training(files, lambda _: fusion, split, Path(run))
    folder, record = _find_folder(run), _load(run)
    if folder is None or (record.config is None) != (files.train is not None):
        needed = "give a run of `fmn train` without --train, or a Tracker's folder with --train"
        raise InputError(f"the training samples of {run} are not known; {needed}")
    fusion, _ = _fusion_of(folder, record, split)
    if files.train is not None:
        return labels.of_tracked(files.train, fusion), fusion
    return labels.of_run(folder, record, fusion, files.device), fusion


def _anchored(val: RunRecord) -> Fusion:
    return knowledge_fusion(val, start="best")


def _overview(record: RunRecord) -> dict[str, Any]:
    forget = scores.forget_fraction(record.correct)
    worst = int(forget.argmax())
    return {
        "final accuracy": float(record.accuracy[-1]),
        "best accuracy": float(record.accuracy.max()),
        "best epoch": int(record.accuracy.argmax()),
        "max forget fraction": float(forget[worst]),
        "at epoch": worst,
        "learned since": float(scores.learn_fraction(record.correct)[worst]),
    }


def _find_folder(run: str) -> Path | None:
    """The folder of a run or of a Tracker; None for a record's file."""
    from fmnlib import runs

    if run.endswith(".npz"):
        return None
    return Path(run) if is_tracked(run) else runs.find(run)


def _load(run: str) -> RunRecord:
    """The record of a folder, a run's name or a file."""
    if is_tracked(run):
        return load_tracked(run)
    return RunRecord.load(_find_folder(run) or Path(run))


def _show(rows: Mapping[str, Any], as_json: bool) -> None:
    """Print named values: one per line, shares in percent; or all in one line of JSON.

    Of the processes that train one run together, only the first prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps({k: vars(v) if isinstance(v, Interval) else v for k, v in rows.items()}))
        return
    for name, value in rows.items():
        text = f"{value:.1%}" if isinstance(value, float) else str(value)
        print(f"{name:<38} {_printable(text)}")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)  # file names hold any character


if __name__ == "__main__":
    main()
