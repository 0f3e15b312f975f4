"""What a student costs beside a plain run: its teacher scored as it trains, or beforehand."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import usual
from benchmarks.cases import WARM_UP, Case, affordable, load
from benchmarks.machine import Machine, work
from benchmarks.measure import Row, Spread
from benchmarks.training import better_workers
from fmnlib import RunConfig
from fmnlib.data import DataSet
from fmnlib.distillation import Member, distill, load_network, members_of, student_config
from fmnlib.fusion import Fusion
from fmnlib.training import build_model, train

__all__ = ["distillation"]

NETWORKS, VIEWS = 4, 8
SAID = {0: "as it trains", VIEWS: f"beforehand, {VIEWS} views of each image"}


def distillation(machine: Machine, repeats: int, small: bool) -> list[Row]:
    """Seconds of a student over those of a plain run of the same length, with augmentation.

    Few epochs are timed; what comes before the first one counts once, the epochs as often as the
    whole run has them.
    """
    rows = []
    for case in affordable(machine.device, small):
        augment = "crop" if case.config.augment == "none" else case.config.augment
        case = dataclasses.replace(case, config=dataclasses.replace(case.config, augment=augment))
        data, note = load(case.config, machine.device)
        if note:  # students load their data themselves
            continue
        with tempfile.TemporaryDirectory() as folder:
            ours, usually = _ratios(case, data, Path(folder), repeats)
        model = build_model(case.config, data)
        counted = work(model, data.shape, case.config.batch_size, machine.dtype)
        teaching = NETWORKS * counted.forward / counted.training
        for views, ratios in ours.items():
            what = f"{case.name}, teacher of {NETWORKS} scored {SAID[views]}"
            floor = 1 + teaching * (views / case.length if views else 1)
            rows.append(
                Row(
                    "distillation",
                    what,
                    "x a plain run",
                    Spread.of(ratios),
                    Spread.of(usually),
                    floor,
                    "operations",
                    str(machine),
                    f"of {case.length} epochs",
                )
            )
    return rows


def _ratios(
    case: Case, data: DataSet, root: Path, repeats: int
) -> tuple[dict[int, list[float]], list[float]]:
    """A student's time over a plain run's, by views scored beforehand; and the usual script's."""
    config, teacher_run = case.config, root / "teacher"
    train(config, teacher_run, device=data.device.type, data=data, progress=False)
    weights = np.zeros(config.epochs)
    weights[np.linspace(0, config.epochs - 1, NETWORKS).astype(int)] = 1 / NETWORKS
    members = members_of(config, teacher_run, Fusion(weights))
    teacher = [(load_network(member, data), member.weight) for member in members]
    student = student_config(config, "kf", members)
    workers = better_workers(config, data, len(data.labels))
    ours: dict[int, list[float]] = {views: [] for views in SAID}
    usually = []
    for number in range(repeats):
        plain = _whole(config, [], root / f"plain_{number}", data, case.length)
        for views, found in ours.items():
            chosen = dataclasses.replace(student, teacher_views=views)
            place = root / f"student_{number}_{views}"
            found.append(_whole(chosen, members, place, data, case.length) / plain)
        alone, taught = (
            usual.epochs(config, data, WARM_UP + 1, workers, teacher=nets)
            for nets in ([], teacher)
        )
        usually.append(min(taught) / min(alone))
    return ours, usually


def _whole(
    config: RunConfig, members: Sequence[Member], folder: Path, data: DataSet, length: int
) -> float:
    """Seconds that a run of `length` epochs takes, from one of fewer."""
    start = time.perf_counter()
    if members:
        record = distill(config, members, folder, device=data.device.type, progress=False)
    else:
        record = train(config, folder, device=data.device.type, progress=False)
    seconds = record.curves["seconds"].astype(float)
    before = time.perf_counter() - start - seconds.sum()
    return before + length * float(np.median(seconds[WARM_UP:]))
