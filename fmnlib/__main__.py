"""The command `fmn`: train, score, fuse and distil runs, and build the book."""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from fmnlib import __version__, commands
from fmnlib.commands import Json, facts, find_folder, load, show
from fmnlib.config import InputError, Paused, RunConfig
from fmnlib.fusion import Fusion, accuracy, single
from fmnlib.record import RunRecord
from fmnlib.search import knowledge_fusion

__all__ = ["main"]

app = App(
    name="fmn",
    version=__version__,
    help="Measure what a network forgets while it trains, fuse it back, distil it into one.",
    suppress_keyboard_interrupt=False,
)
Flags = Annotated[RunConfig, Parameter(name="*")]
_QUICK = RunConfig()


@app.command(name="train")
def train_run(
    config: Flags = _QUICK,
    *,
    device: str = "auto",
    max_minutes: float = math.inf,
    as_json: Json = False,
) -> None:
    """Train one network and record what it knows after every epoch.

    The run lies in runs/ (or where FMN_RUNS says), under a name that comes from its settings. A
    run that was stopped goes on; a complete one is read.

    Args:
        config: What to train.
        device: cpu, cuda, or auto for a GPU if there is one.
        max_minutes: Stop after the last epoch that ends within this time.
        as_json: Print JSON.
    """
    from fmnlib.study import runs
    from fmnlib.training.train import train

    deadline = _deadline(max_minutes)
    record = train(config, runs.folder(config), device=device, deadline=deadline)
    show({"run": config.id} | facts(record), as_json)


app.command(commands.score)
app.command(commands.fuse)


@app.command(name="distill")
def distill_run(
    run: str,
    *,
    split: int | None = None,
    temperature: float = RunConfig.temperature,
    soft_share: float = RunConfig.soft_share,
    teacher_views: int = 0,
    device: str = "auto",
    max_minutes: float = math.inf,
    as_json: Json = False,
) -> None:
    """Put the fusion of a run into one network of the original size.

    Takes the fusion that `fmn fuse` wrote, or finds one in the same way.

    Args:
        run: Folder of a run, or the beginning of its name.
        split: Seed that draws the halves; that of the fusion where not given.
        temperature: Softens the teacher and the student.
        soft_share: Weight of the teacher's term; the labels' term has the rest.
        teacher_views: Let the teacher score so many views of each augmented image beforehand.
        device: cpu, cuda, or auto for a GPU if there is one.
        max_minutes: Stop after the last epoch that ends within this time.
        as_json: Print JSON.
    """
    from fmnlib.training.distill import distill, members_of, student_config

    place, record = find_folder(run), load(run)
    if place is None or record.config is None:
        files = "" if place is None else f" --checkpoints '{place}/checkpoints/*'"
        way = f"`fmn fuse{files} --network distilled` distils from checkpoints alone"
        raise InputError(f"{run} has no checkpoints of `fmn train`; {way}")
    fusion, split = _fusion_of(place, record, split)
    test = record.split(split)[1]
    members = members_of(record.config, place, fusion)
    config = student_config(
        record.config, "kf", members, temperature=temperature, soft_share=soft_share
    )
    config = dataclasses.replace(config, teacher_views=teacher_views)
    folder, deadline = place.parent / config.id, _deadline(max_minutes)
    student = distill(config, members, folder, device=device, deadline=deadline)
    told = {
        "test accuracy, single": accuracy(test, single(test)),
        f"test accuracy, {fusion.networks} networks fused": accuracy(test, fusion),
        "test accuracy, student": accuracy(student.split(split)[1], single(student)),
    }
    show({"student": config.id} | told | {"split": split}, as_json)


def _deadline(minutes: float) -> float:
    if math.isnan(minutes):
        raise InputError("max_minutes is nan; give a number of minutes")
    return time.monotonic() + 60 * minutes


def _fusion_of(place: Path, record: RunRecord, split: int | None) -> tuple[Fusion, int]:
    """The fusion that `fmn fuse` wrote, or one found in the same way, and the split it is of."""
    written = place / "fusion.json"
    if not written.exists():
        return knowledge_fusion(record.split(split or 0)[0]), split or 0
    fusion = Fusion.load(written)
    if None not in (fusion.split, split) and fusion.split != split:  # its test half has chosen
        told = f"the fusion was chosen on split {fusion.split} and split is {split}"
        raise InputError(f"{told}; leave out --split, or `fmn fuse --split {split}` first")
    return fusion, (fusion.split if split is None else split) or 0


@app.command(name="runs")
def list_runs(*, as_json: Json = False) -> None:
    """List the runs there are.

    Args:
        as_json: Print JSON.
    """
    from fmnlib.study import runs

    rows = runs.listing()
    if as_json:
        print(json.dumps(rows))
    elif not rows:
        print(f"no runs in {runs.root()}; `fmn train` makes one")
    for row in [] if as_json else rows:
        accuracy = f"{row['accuracy']:.1%}" if "accuracy" in row else ""
        epochs = f"{row['epochs']} epochs" if "epochs" in row else ""
        print(f"{row['run']:<60} {epochs:>11}  {row['state']:<10} {accuracy}")


@app.command(name="grid")
def grid_of_runs(
    name: str,
    *,
    status: bool = False,
    out: Path | None = None,
    max_minutes: float = math.inf,
    workers: int | None = None,
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Work through a grid of runs, most telling first; what was stopped goes on.

    Args:
        name: paper (CIFAR-100, ResNet-18: the papers' tables) or cpu (what two cores can do).
        status: Only say what is done, running and left.
        out: Write scores and light records of the complete cells into this folder; cells that it
            holds already are not trained again.
        max_minutes: Stop after the last epoch that ends within this time.
        workers: Runs at a time; as many as there are cores, or one on a GPU, where not given.
        device: cpu, cuda, or auto for a GPU if there is one.
        as_json: Print JSON.
    """
    from fmnlib.study import grid

    cells = grid.cells(name)
    there = grid.published(out) if out is not None else {}
    try:
        if not status:
            left = [cell for cell in cells if cell.id not in there]
            grid.work(left, device=device, workers=workers, deadline=_deadline(max_minutes))
    finally:
        rows = grid.status(cells, there)
        if out is not None and not status:
            grid.publish(cells, out)
        if as_json:
            print(json.dumps(rows))
        for row in [] if as_json else rows:
            took = f"{row['seconds']:8.0f} s" if "seconds" in row else ""
            print(f"{row['network']:<64} {row['state']:<10}{took}")


@app.command
def book(*, cached: bool = False, update: bool = False, as_json: Json = False) -> None:
    """Run every notebook and build the book; print the path of its first page.

    Args:
        cached: Compute from the committed records instead of training anew.
        update: Train anew and bring the committed records, outputs and numbers up to date.
        as_json: Print JSON.
    """
    from fmnlib.study.book import build

    page = str(build(cached=cached, update=update))
    print(json.dumps({"page": page}) if as_json else page)


@app.command
def download(dataset: str, *, as_json: Json = False) -> None:
    """Fetch a data set by torchvision into data/ (or where FMN_DATA says).

    Args:
        dataset: mnist, fashion_mnist, cifar10 or cifar100.
        as_json: Print JSON.
    """
    from fmnlib.training import sources

    folder = str(sources.download(dataset))
    print(json.dumps({"folder": folder}) if as_json else folder)


def main() -> None:
    """Run the command; bad input ends in one line on standard error and exit code 2."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except Paused as word:
        print(f"fmn: {word}")
    except (InputError, CycloptsError) as error:
        print("fmn:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, no permission
        told = "what was written stays; mend that and give the same command again"
        print(f"fmn: {error}; {told}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not _of_gpu(error):
            raise
        first = str(error).partition("\n")[0]
        print(f"fmn: the GPU failed ({first}); the same command goes on", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fmn: stopped; the same command again, and a run goes on", file=sys.stderr)
        sys.exit(130)


def _of_gpu(error: RuntimeError) -> bool:
    """Whether an error is the device's, such as one that is lost or has no memory left."""
    return "CUDA" in str(error) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")


if __name__ == "__main__":
    main()
