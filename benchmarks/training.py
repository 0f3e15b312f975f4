"""Images per second of training, what recording adds, and several runs side by side on a GPU."""

import math
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import usual
from benchmarks.cases import WARM_UP, Case, affordable, cases, load
from benchmarks.machine import Machine, disk_rate, wait, work
from benchmarks.measure import Row, Spread
from fmnlib import RunConfig
from fmnlib.data import DataSet
from fmnlib.parallel import World
from fmnlib.step import Parts, Step, make_optimizer
from fmnlib.training import build_model, learning_rate, predict, train

__all__ = ["better_workers", "epoch_seconds", "recording", "side_by_side", "throughput"]

_start: Any = None  # where the processes that run at once meet

USUAL_IMAGES = 25_600
"""The usual script trains on so many images at most; it only has to show its rate."""


def throughput(machine: Machine, repeats: int, small: bool) -> list[Row]:
    """Training images per second, all that surrounds training included.

    Ours is `train` with every epoch evaluated, recorded, checkpointed and its state saved; the
    usual script trains and evaluates. The floor is of training alone.
    """
    rows = []
    for case in cases(machine.device, small):
        config, (data, note) = case.config, load(case.config, machine.device)
        samples = len(data.labels)
        few = min(samples, USUAL_IMAGES)
        workers = better_workers(config, data, few)
        ours, theirs = [], []
        for _ in range(repeats):
            ours += [samples / s for s in epoch_seconds(config, data)]
            timed = usual.epochs(config, data, WARM_UP + 1, workers, samples=few)
            theirs += [few / s for s in timed[WARM_UP - 1 :]]
        floor, bound = _floor(machine, case, data)
        said = f"usual script with {workers} workers"
        rows.append(
            Row(
                "training",
                case.name,
                "images/s",
                Spread.of(ours),
                Spread.of(theirs),
                1 / floor,
                bound,
                str(machine),
                f"{said}, {note}" if note else said,
            )
        )
    return rows


def recording(machine: Machine, repeats: int, small: bool) -> list[Row]:
    """What evaluation adds to training, and what record, checkpoint and state add to both.

    Each is the ratio of neighbouring measurements, so that drift of the machine cancels.
    """
    rows = []
    for case in affordable(machine.device, small):
        config, (data, note) = case.config, load(case.config, machine.device)
        few = min(len(data.labels), USUAL_IMAGES)
        workers = better_workers(config, data, few)
        alone, seeing, keeping, usually = [], [], [], []
        for _ in range(repeats):
            alone.append(_median(_bare_epochs(config, data, evaluate=False)))
            seen = _median(_bare_epochs(config, data, evaluate=True))
            seeing.append(100 * (seen / alone[-1] - 1))
            keeping.append(100 * (_median(epoch_seconds(config, data)) / seen - 1))
            with tempfile.TemporaryDirectory() as folder:
                plain, saved = (
                    usual.epochs(config, data, WARM_UP + 1, workers, samples=few, save=place)
                    for place in (None, Path(folder))
                )
            usually.append(100 * (min(saved) / min(plain) - 1))
        model = build_model(config, data)
        counted = work(model, data.shape, config.batch_size, machine.dtype)
        seconds = machine.seconds(counted.training, counted.moved)[0] * len(data.labels)
        scored = counted.forward * len(data.eval_labels) / machine.operations
        with tempfile.TemporaryDirectory() as folder:
            written = _bytes_written(model, data) / disk_rate(Path(folder))
        about = str(machine), f"{len(data.eval_labels):,} images; {note}".removesuffix("; ")
        rows += [
            Row(
                "recording",
                f"{case.name}: evaluation, over training",
                "%",
                Spread.of(seeing),
                None,
                100 * scored / seconds,
                "operations",
                *about,
            ),
            Row(
                "recording",
                f"{case.name}: record, checkpoint and state, over both",
                "%",
                Spread.of(keeping),
                Spread.of(usually),
                100 * written / _median(alone),
                "bytes to disk",
                *about,
            ),
        ]
    return rows


def side_by_side(machine: Machine, repeats: int, small: bool) -> list[Row]:
    """Total images per second of 1, 2 and 4 runs at once, each in its own process; on GPUs."""
    if machine.device.type != "cuda":
        return []
    rows = []
    for case in cases(machine.device, small):
        note = load(case.config, torch.device("cpu"))[1]
        for runs in (1, 2, 4):
            context = multiprocessing.get_context("spawn")
            start = context.Barrier(runs, timeout=300)
            with ProcessPoolExecutor(runs, context, _meet_at, (start,)) as pool:
                rates = list(pool.map(_one_of_many, [case.config] * runs))
            total = [sum(epoch) for epoch in zip(*rates, strict=True)]
            what = f"{case.name}, {runs} at once"
            rows.append(
                Row("at once", what, "images/s", Spread.of(total), device=str(machine), note=note)
            )
    return rows


def epoch_seconds(config: RunConfig, data: DataSet) -> list[float]:
    """Seconds of each epoch of `train`, everything recorded, after those to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        record = train(config, place, device=data.device.type, data=data, progress=False)
        return [float(s) for s in record.curves["seconds"][WARM_UP:]]


def better_workers(config: RunConfig, data: DataSet, samples: int) -> int:
    """With how many workers the usual script is fastest."""
    cores = os.cpu_count() or 1
    tried = {
        count: min(usual.epochs(config, data, 2, count, samples=samples))
        for count in sorted({0, 2, *([cores // 2] if cores > 4 else [])})
    }
    return min(tried, key=tried.__getitem__)


def _bare_epochs(config: RunConfig, data: DataSet, evaluate: bool) -> list[float]:
    """Seconds of epochs that take the same steps as `train` and write nothing."""
    model = build_model(config, data)
    parts = Parts(model, make_optimizer(config, model), model)

    def criterion(logits: Tensor, _: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(logits, data.labels[index], reduction="none")

    step = Step(config, data, parts, criterion, World(), graphs=True)
    seconds = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for epoch in range(config.epochs):
            wait(data.device)
            start = time.perf_counter()
            _bare_epoch(step, epoch)
            if evaluate:
                predict(model, data, data.eval_images, config.precision)
            wait(data.device)
            seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def _bare_epoch(step: Step, epoch: int) -> None:
    config, data = step.config, step.data
    order = torch.randperm(len(data.labels), device=data.device)
    batches = order.tensor_split(math.ceil(len(order) / config.batch_size))
    step.parts.model.train()
    views = data.views(batches, config.augment, epoch)
    for number, (index, images) in enumerate(zip(batches, views, strict=True)):
        done = (epoch + number / len(batches)) / config.epochs
        step(images, index, learning_rate(config, done))


def _meet_at(barrier: Any) -> None:
    """Give a process the barrier at which all start."""
    global _start
    _start = barrier


def _one_of_many(config: RunConfig) -> list[float]:
    """Images per second of each epoch, while as many other processes train."""
    data, _ = load(config, torch.device("cuda"))
    _start.wait()
    return [len(data.labels) / seconds for seconds in epoch_seconds(config, data)]


def _floor(machine: Machine, case: Case, data: DataSet) -> tuple[float, str]:
    """Least seconds of training for one image, and what bounds them."""
    model = build_model(case.config, data)
    counted = work(model, data.shape, case.config.batch_size, machine.dtype)
    return machine.seconds(counted.training, counted.moved)


def _bytes_written(model: nn.Module, data: DataSet) -> int:
    """Of an epoch: probabilities in half precision; weights, and again with momentum as state."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return 2 * len(data.eval_labels) * data.classes + 3 * weights


def _median(values: list[float]) -> float:
    return Spread.of(values).median
