"""A resumable, prioritised grid of runs: the larger experiments of the book."""

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout

from fmnlib import runs
from fmnlib.checkpoint import folder_lock
from fmnlib.config import InputError, RunConfig
from fmnlib.data import load
from fmnlib.files import open_regular, write_whole
from fmnlib.fusion import best_epochs, knowledge_fusion
from fmnlib.paper import compare
from fmnlib.plots import METHODS
from fmnlib.record import RunRecord
from fmnlib.runs import Job

_SPLIT = 0  # one split: the uncertainty is over training seeds
_MEMBERS = 3  # networks of an independent ensemble
_FORGOTTEN = 12  # forgotten images that are published per run


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid, and the networks that its comparison needs."""

    config: RunConfig  #: The run
    #: Compare with the papers' Table 3 and with the students of other teachers instead
    wider: bool = False
    teacher_views: int = 0  #: Of its student, as in `fmnlib.paper.compare.compare`

    @property
    def id(self) -> str:
        """The cell's name in `results.json`."""
        return f"{self.config.id}-wider" if self.wider else self.config.id


_SYMMETRIC_40 = {"noise": "symmetric", "noise_rate": 0.4}
_SYMMETRIC_20 = {"noise": "symmetric", "noise_rate": 0.2}
_ASYMMETRIC_40 = {"noise": "asymmetric", "noise_rate": 0.4}
_ASYMMETRIC_20 = {"noise": "asymmetric", "noise_rate": 0.2}
_SMALL = {"train_samples": 10_000, "eval_samples": 5_000, "precision": "bfloat16"}
_CONVNET = _SYMMETRIC_40 | _SMALL | {"model": "convnet", "width": 2.0}
_CIFAR100 = _SYMMETRIC_40 | _SMALL | {"dataset": "cifar100", "epochs": 30}

_NARROW = {"width": 0.25, "eval_samples": 5_000, "precision": "bfloat16"}
_AUGMENTED = _NARROW | {"train_samples": 10_000, "epochs": 100}
_MEMORISING = _NARROW | {"train_samples": 20_000, "epochs": 40, "augment": "none"}
_HUMAN = {"noise": "human"}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the cells of a grid have in common, and what each changes, most informative first."""

    profile: str  #: Of `RunConfig.of_profile`
    changes: list[dict[str, Any]]  #: Of the profile, for each cell
    wider: bool = False  #: The first three cells also have wider ones
    teacher_views: int = 0  #: Of the students of augmented runs
    #: Every training seed has its own noise and its own part of the images
    vary_noise: bool = False


GRIDS = {
    "paper": Grid(
        "paper",
        [_SYMMETRIC_40, {}, _ASYMMETRIC_40, _SYMMETRIC_20, _ASYMMETRIC_20, _HUMAN],
        wider=True,
        teacher_views=16,
    ),
    "cpu": Grid("standard", [_CONVNET, _CIFAR100]),
    "cifar": Grid(
        "paper",
        [
            *(_AUGMENTED | _SYMMETRIC_40, _MEMORISING | _SYMMETRIC_40, _AUGMENTED),
            *(_AUGMENTED | noise for noise in (_ASYMMETRIC_40, _HUMAN, _SYMMETRIC_20)),
        ],
        teacher_views=8,
        vary_noise=True,
    ),
}


def cells(grid: str, seeds: Sequence[int] = (0, 1, 2)) -> list[Cell]:
    """The cells of a grid, most informative first.

    >>> [cell.config.setting for cell in cells("paper", seeds=[0])]
    ['sym40', 'clean', 'asym40', 'sym20', 'asym20', 'human', 'sym40', 'clean', 'asym40']
    """
    if grid not in GRIDS:
        raise InputError(f"grid is {grid!r}; choose one of {', '.join(GRIDS)}")
    plan, every = GRIDS[grid], []
    for change in plan.changes:
        for seed in seeds:
            drawn = {"noise_seed": seed} if plan.vary_noise else {}
            config = RunConfig.of_profile(plan.profile, **change, seed=seed, **drawn)
            every.append(Cell(config, teacher_views=plan.teacher_views))
    wide = every[: 3 * len(seeds)] if plan.wider else []
    return every + [dataclasses.replace(cell, wider=True) for cell in wide]


def work(
    every: Sequence[Cell], *, make: Callable[..., None] = runs.make_all, **options: Any
) -> None:
    """Make what is missing, the most informative first; interrupted runs are resumed.

    On this machine, or by `fmnlib.runs.make_on_ray` on a cluster. Options are those of `make`,
    such as `device` and `deadline`.

    Raises:
        Paused: If the deadline leaves something to make.
    """

    def missing() -> list[Job]:
        return [job for _, _, job in _named(every) if job and not runs.complete(job.config)]

    make(missing, **options)


def status(every: Sequence[Cell], published: Container[str] = ()) -> list[dict[str, str | float]]:
    """One row for each network of a grid: what it is for, its state, the seconds it took.

    Cells whose ids are published need not be made here.
    """
    rows = []
    for cell, name, job in _named(every):
        state = "published" if cell.id in published else "left"
        row: dict[str, str | float] = {"network": name, "state": state}
        if job and runs.complete(job.config):
            record = RunRecord.load(runs.folder(job.config) / "record.npz")  # no probabilities
            row |= {"state": "done", "seconds": float(record.provenance["seconds"])}
        elif job and state == "left" and runs.folder(job.config).exists():
            row["state"] = "running" if _locked(runs.folder(job.config)) else "begun"
        rows.append(row)
    return rows


def published(target: Path) -> dict[str, dict[str, Any]]:
    """What `publish` wrote, by the ids of the cells; empty where it wrote nothing.

    Raises:
        InputError: If it is not a folder, or its file is damaged.
    """
    file = target / "results.json"
    if target.exists() and not target.is_dir():
        raise InputError(f"out is {target}, which is a file; give a folder")
    try:
        if not file.exists():
            return {}
        with open_regular(file) as stored:
            return {name: dict(cell) for name, cell in dict(json.load(stored)["cells"]).items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{file} holds no results ({error}); move it away, or give another folder"
        raise InputError(message) from error


def publish(every: Sequence[Cell], target: Path) -> int:
    """Write scores and light records of the cells that are complete here; return their number.

    A cell that lacks only its further independent networks is written without their ensemble, and
    is not whole. Cells that were published before, by another machine perhaps, stay as they are,
    and count. The target is a folder for `results.json`, `records/` and, of the first seed,
    `forgotten/`.
    """
    before, new = published(target), {}
    for cell in every:
        made = [job is not None and runs.complete(job.config) for _, job in _jobs(cell)]
        whole, further = all(made), _MEMBERS - 1  # the further networks are a cell's last jobs
        if not whole and (cell.wider or cell.id in before or not all(made[:-further])):
            continue
        item = f"{cell.config.dataset}-{cell.config.model}"
        options: dict[str, Any] = {"item": item, "splits": (_SPLIT,), "fresh": True}
        record = RunRecord.load(runs.folder(cell.config))
        found: dict[str, Any] = {"provenance": dict(record.provenance), "whole": whole}
        if cell.wider:
            results = compare.compare_protocols([cell.config], **options)
            results += compare.compare_students([cell.config], members=_MEMBERS, **options)
        else:
            options |= {"members": _MEMBERS if whole else 1, "teacher_views": cell.teacher_views}
            results = compare.compare([cell.config], **options)
            results = [r for r in results if whole or r.method != "independent"]
            record.save(target / "records" / f"{cell.config.id}.npz", light=True)
            found["kf_weights"] = knowledge_fusion(record.split(_SPLIT)[0]).weights.tolist()
            if cell.config.seed == every[0].config.seed:  # examples to look at: one seed is enough
                _save_forgotten(record, target / "forgotten" / f"{cell.config.id}.npz")
        found["results"] = [dataclasses.asdict(result) for result in results]
        new[cell.id] = found
    content = published(target) | new  # another machine may have written meanwhile
    content = {cell.id: content[cell.id] for cell in every if cell.id in content} | content
    text = json.dumps({"cells": content}, indent=1) + "\n"
    write_whole(target / "results.json", text.encode())
    return len(content)


def _save_forgotten(record: RunRecord, path: Path) -> None:
    """The images that were right after the most epochs and are wrong at the end, to be shown."""
    assert record.config is not None
    epochs_right = record.correct[:-1].sum(axis=0) * ~record.correct[-1]
    most = np.argsort(-epochs_right, kind="stable")[:_FORGOTTEN]
    most = most[epochs_right[most] > 0]
    data = load(record.config)
    [images] = data.gather(data.eval_images, [torch.from_numpy(most)])
    about = {"label": record.labels, "predicted": record.predicted[-1], "epochs": epochs_right}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=images.numpy(), **{k: v[most] for k, v in about.items()})
    write_whole(path, buffer.getvalue())


def _named(every: Sequence[Cell]) -> Iterator[tuple[Cell, str, Job | None]]:
    for cell in every:
        config = cell.config
        run = f"{config.dataset} {config.model} {config.setting} seed {config.seed}"
        for what, job in _jobs(cell):
            yield cell, f"{run}, {what}", job


def _jobs(cell: Cell) -> Iterator[tuple[str, Job | None]]:
    """The networks of a cell by name, with jobs; None until the run they depend on is complete."""
    config = cell.config
    ensemble = compare.independent_members(config, _MEMBERS)
    if cell.wider:
        yield from compare.protocol_jobs(config)
        yield "student of the final network", compare.student_of_finals("single", ensemble[:1])
        student = compare.student_of_finals("independent", ensemble)
        yield "student of the independent networks", student
        return
    yield "run", Job(config)
    jobs = _merged(cell, runs.folder(config)) if runs.complete(config) else {}
    for method in ("distilled_kf", "averaged_kf", "averaged_best"):
        yield METHODS[method].name, jobs.get(method)
    for number, member in enumerate(ensemble[1:], 2):
        yield f"independent network {number}", Job(member)


@functools.cache  # a grid asks again after each of its runs
def _merged(cell: Cell, folder: Path) -> dict[str, Job]:
    """The networks that are made from the run of a cell."""
    val, views = RunRecord.load(folder).split(_SPLIT)[0], cell.teacher_views
    return compare.merged_jobs(cell.config, best_epochs(val), knowledge_fusion(val), views)


def _locked(folder: Path) -> bool:
    """Whether a process works in a run's folder."""
    if not (folder / ".lock").exists():
        return False
    try:
        with folder_lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True
