"""A resumable, prioritised grid of runs: the larger experiments of the book."""

import dataclasses
import json
import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fmnlib import runs
from fmnlib.config import InputError, RunConfig
from fmnlib.files import write_whole
from fmnlib.fusion import knowledge_fusion
from fmnlib.paper.compare import (
    compare,
    compare_protocols,
    compare_students,
    independent_members,
    protocol_jobs,
    student_of_finals,
)
from fmnlib.record import RunRecord
from fmnlib.runs import Job

SPLIT = 0
"""The halves of the one split that is used; the seeds give the uncertainty."""
MEMBERS = 3
"""Networks of an independent ensemble."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid, and what is made from it and beside it.

    Attributes:
        config: The run.
        wider: Make what the papers' Table 3 and the students of other teachers need, too.
    """

    config: RunConfig
    wider: bool = False

    @property
    def id(self) -> str:
        """The cell's name among what is published."""
        return f"{self.config.id}-wider" if self.wider else self.config.id


_SYMMETRIC_40 = {"noise": "symmetric", "noise_rate": 0.4}
_SYMMETRIC_20 = {"noise": "symmetric", "noise_rate": 0.2}
_ASYMMETRIC_40 = {"noise": "asymmetric", "noise_rate": 0.4}
_ASYMMETRIC_20 = {"noise": "asymmetric", "noise_rate": 0.2}
_SMALL = {"train_samples": 10_000, "eval_samples": 5_000, "precision": "bfloat16"}

# For each grid its profile, and what its cells change, most telling first.
GRIDS: dict[str, tuple[str, list[dict[str, Any]], bool]] = {
    "paper": (
        "paper",
        [_SYMMETRIC_40, {}, _ASYMMETRIC_40, _SYMMETRIC_20, _ASYMMETRIC_20, {"noise": "human"}],
        True,
    ),
    "cpu": (
        "standard",
        [
            _SYMMETRIC_40 | _SMALL | {"model": "convnet", "width": 2.0},
            _SYMMETRIC_40 | _SMALL | {"dataset": "cifar100", "epochs": 30},
        ],
        False,
    ),
}


def cells(grid: str, seeds: Sequence[int] = (0, 1, 2)) -> list[Cell]:
    """The cells of a grid, most telling first.

    >>> [cell.config.setting for cell in cells("paper", seeds=[0])]
    ['sym40', 'clean', 'asym40', 'sym20', 'asym20', 'human', 'sym40', 'clean', 'asym40']
    """
    if grid not in GRIDS:
        raise InputError(f"grid is {grid!r}; choose one of {', '.join(GRIDS)}")
    profile, changes, wider = GRIDS[grid]
    every = [RunConfig.of_profile(profile, **c, seed=seed) for c in changes for seed in seeds]
    first = [Cell(config) for config in every]
    more = every[: 3 * len(seeds)] if wider else []
    return first + [Cell(config, wider=True) for config in more]


def work(
    every: Sequence[Cell],
    *,
    device: str = "auto",
    workers: int | None = None,
    deadline: float = math.inf,
) -> None:
    """Make what is missing, in order; runs that were stopped go on.

    Args:
        every: The cells, most telling first.
        device: As in `fmnlib.training.train`.
        workers: Runs at a time, as in `fmnlib.runs.obtain`.
        deadline: As in `fmnlib.training.train`.

    Raises:
        Paused: If something is left to make for the deadline.
    """
    runs.make_all(
        lambda: [job for _, _, job in _named(every) if job and not runs.complete(job.config)],
        device=device,
        workers=workers,
        deadline=deadline,
    )


def status(every: Sequence[Cell], published: Container[str] = ()) -> list[dict[str, str | float]]:
    """One row for each network of a grid: what it is for, its state, the seconds it took.

    Args:
        every: The cells.
        published: Cells that need not be made here any more, by their ids.
    """
    rows = []
    for cell, name, job in _named(every):
        state = "published" if cell.id in published else "left"
        row: dict[str, str | float] = {"network": name, "state": state}
        if job and runs.complete(job.config):
            record = RunRecord.load(runs.folder(job.config))
            row |= {"state": "done", "seconds": float(record.provenance["seconds"])}
        elif job and state == "left" and runs.folder(job.config).exists():
            row["state"] = "running" if _held(runs.folder(job.config)) else "begun"
        rows.append(row)
    return rows


def published(target: Path) -> dict[str, dict[str, Any]]:
    """What `publish` wrote, by the ids of the cells; empty where it wrote nothing.

    Raises:
        InputError: If the folder is none, or its file is damaged.
    """
    file = target / "results.json"
    if target.exists() and not target.is_dir():
        raise InputError(f"out is {target}, which is a file; give a folder")
    try:
        return dict(json.loads(file.read_text())["cells"]) if file.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"{file} holds no results ({error!r})"
        raise InputError(f"{told}; move it away, or give another folder") from error


def publish(every: Sequence[Cell], target: Path) -> int:
    """Write the scores and the light records of the cells that are complete here.

    Cells that were published before, by another machine perhaps, stay as they are.

    Args:
        every: The cells.
        target: Folder for `results.json` and `records/`.

    Returns:
        The number of cells that are published now.
    """
    found = published(target)
    for cell in filter(_whole, every):
        chosen: dict[str, Any] = {"splits": (SPLIT,), "fresh": True}
        chosen["item"] = f"{cell.config.dataset}-{cell.config.model}"
        record = RunRecord.load(runs.folder(cell.config))
        if cell.wider:
            results = compare_protocols([cell.config], **chosen)
            results += compare_students([cell.config], members=MEMBERS, **chosen)
        else:
            results = compare([cell.config], members=MEMBERS, **chosen)
            record.save(target / "records" / f"{cell.config.id}.npz", light=True)
        scores = [dataclasses.asdict(result) for result in results]
        found[cell.id] = {"provenance": dict(record.provenance), "results": scores}
    order = [cell.id for cell in every]
    content = {name: found[name] for name in (*order, *(found.keys() - order)) if name in found}
    write_whole(
        target / "results.json", (json.dumps({"cells": content}, indent=1) + "\n").encode()
    )
    return len(content)


def _whole(cell: Cell) -> bool:
    return all(job is not None and runs.complete(job.config) for _, job in _jobs(cell))


def _named(every: Sequence[Cell]) -> Iterator[tuple[Cell, str, Job | None]]:
    for cell in every:
        config = cell.config
        where = f"{config.dataset} {config.model} {config.setting} seed {config.seed}"
        for what, job in _jobs(cell):
            yield cell, f"{where}, {what}", job


def _jobs(cell: Cell) -> Iterator[tuple[str, Job | None]]:
    """The networks of a cell; None for those that only the complete run can name."""
    run = cell.config
    crowd = independent_members(run, MEMBERS)
    if cell.wider:
        yield from protocol_jobs(run)
        yield "student of the final network", student_of_finals("single", crowd[:1])
        yield "student of the independent networks", student_of_finals("independent", crowd)
        return
    yield "run", Job(run)
    if runs.complete(run):
        kf = knowledge_fusion(RunRecord.load(runs.folder(run)).split(SPLIT)[0])
        yield "Distilled KF", runs.student(run, "kf", kf)
        yield "Averaged KF", runs.averaged(run, "kf", kf)
    else:
        yield "Distilled KF", None
        yield "Averaged KF", None
    for number, config in enumerate(crowd[1:], 2):
        yield f"independent network {number}", Job(config)


def _held(folder: Path) -> bool:
    """Whether a process holds a run's folder."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
