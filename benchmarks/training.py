"""What training costs: images per second, recording, several runs at once, and distillation."""

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Barrier
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.benchmark import timer

from benchmarks.machine import Machine, measure, work
from benchmarks.report import Row, row
from benchmarks.usual import Script, fastest_workers
from fmnlib import InputError, RunConfig
from fmnlib import data as datasets
from fmnlib.data import DataSet
from fmnlib.distillation import Member, distill, load_network, student_config
from fmnlib.parallel import World
from fmnlib.step import Step, TrainingState, make_optimizer, make_scaler
from fmnlib.training import build_model, predict, train

Case = tuple[str, RunConfig, DataSet, str]
WARM_UP = 2  # epochs that are not timed: kernels are chosen, graphs captured, caches filled
NETWORKS = 4  # of a teacher
SCORED = {0: "as it trains", 8: "in advance, 8 views of each image"}  # by `teacher_views`


def cases(device: torch.device, small: bool, often: bool = False) -> Iterator[Case]:
    """Short runs to time, with their data and a word of it; on a CPU one, if timed often."""
    cuda = device.type == "cuda"
    part = {"epochs": 12} if cuda else {"epochs": 4, "train_samples": 1000, "eval_samples": 500}
    half = {"epochs": 10, "train_samples": 25_000, "eval_samples": 5_000}
    few = {"epochs": 4, "train_samples": 200, "eval_samples": 100} if small else {}
    found = [
        ("convnet, digits", "quick", {"epochs": 20}),
        ("ResNet-8, Fashion-MNIST", "standard", part),
        ("ResNet-18, CIFAR-100", "paper", half),
    ]
    for name, profile, changes in found[: 3 if cuda else 1 if small or often else 2]:
        config = RunConfig.of_profile(profile, **changes | few)
        yield name, config, *load(config, device)


def load(config: RunConfig, device: torch.device) -> tuple[DataSet, str]:
    """The data of a run, or as many random pixels where they are not at hand; and a word of it."""
    with suppress(InputError):  # how long a step takes does not depend on what images show
        return datasets.load(config, device), ""
    gray = config.dataset == "fashion_mnist"
    shape, classes = ((1, 28, 28), 10) if gray else ((3, 32, 32), 100)
    split = [config.train_samples, config.eval_samples or 10_000]
    with device:
        images, tested = torch.randint(256, (sum(split), *shape), dtype=torch.uint8).split(split)
        labels, truth = torch.randint(classes, (sum(split),)).split(split)
        half, clean = torch.full(shape[:1], 0.5), torch.zeros_like(labels).bool()
    return DataSet(images, labels, clean, tested, truth, classes, half, half), "random pixels"


def throughput(machine: Machine, repeats: int, small: bool) -> Iterator[Row]:
    """Images per second of training, evaluating and, with this library, recording everything."""
    for name, config, data, note in cases(machine.device, small):
        workers, samples = fastest_workers(config, data), len(data.labels)
        ours, usual = [], []
        for _ in range(repeats):
            ours += [samples / seconds for seconds in run_seconds(config, data.device)[1]]
            script = Script(config, data, workers)
            usual += [samples / seconds for seconds in measure(script.epoch, small).times]
        counted = work(build_model(config, data), data.shape, config.batch_size, machine.dtype)
        seconds, bound = machine.roofline(*counted)
        note = f"usual script with {workers} workers, {note}".removesuffix(", ")
        yield row(name, "images/s", ours, usual, best=1 / seconds, bound=bound, note=note)


def recording(machine: Machine, repeats: int, small: bool) -> Iterator[Row]:
    """What evaluation adds to training, and what record, checkpoint and state add to both."""
    for name, config, data, note in cases(machine.device, small, often=True):
        workers = fastest_workers(config, data)
        evaluated, recorded, usual = [], [], []
        for _ in range(repeats):
            alone, evaluation = bare_seconds(config, data, small)
            evaluated.append(100 * evaluation / alone)
            full = median(run_seconds(config, data.device)[1])
            recorded.append(100 * (full / (alone + evaluation) - 1))
            with TemporaryDirectory() as folder:
                saving = measure(Script(config, data, workers, save=Path(folder)).epoch, small)
            plain = measure(Script(config, data, workers).epoch, small)
            usual.append(100 * (saving.median / plain.median - 1))
        note = f"{len(data.eval_labels):,} images; {note}".removesuffix("; ")
        yield row(f"{name}: evaluation, over training", "%", evaluated, note=note)
        kept = f"{name}: record, checkpoint and state, over both"
        yield row(kept, "%", recorded, usual, note=note)


def at_once(machine: Machine, repeats: int, small: bool) -> Iterator[Row]:
    """Total images per second of 1, 2 and 4 runs at once, each in its own process; on GPUs."""
    context = multiprocessing.get_context("spawn")
    for name, config, data, note in cases(machine.device, small):
        for runs in (1, 2, 4) if machine.device.type == "cuda" else ():
            with context.Manager() as manager, ProcessPoolExecutor(runs, context) as pool:
                given = [(config, machine.device, manager.Barrier(runs, timeout=300))] * runs
                epochs = zip(*pool.map(one_of_many, given), strict=True)
                rates = [sum(len(data.labels) / each for each in seconds) for seconds in epochs]
            yield row(f"{name}, {runs} at once", "images/s", rates, note=note)


def one_of_many(given: tuple[RunConfig, torch.device, Barrier]) -> list[float]:
    """Seconds of the epochs of a run, which starts when as many others do."""
    config, device, start = given
    torch.cuda.set_device(device)
    start.wait()
    return run_seconds(config, device)[1]


def distillation(machine: Machine, repeats: int, small: bool) -> Iterator[Row]:
    """Seconds of a student over those of a plain run of the same length, with augmentation."""
    for name, config, data, missing in cases(machine.device, small, often=True):
        if missing:  # students load their data themselves
            continue
        config = replace(config, augment="crop" if config.augment == "none" else config.augment)
        length = RunConfig.of_profile("paper" if config.model == "resnet18" else "quick").epochs
        rounds = (student_ratios(config, length, data, small) for _ in range(repeats))
        *ours, usual = zip(*rounds, strict=True)
        for when, ratios in zip(SCORED.values(), ours, strict=True):
            what = f"{name}, teacher of {NETWORKS} scored {when}"
            yield row(what, "x a plain run", ratios, usual, note=f"of {length} epochs")


def student_ratios(config: RunConfig, length: int, data: DataSet, small: bool) -> list[float]:
    """A student's time over a plain run's, for each of `SCORED` and in the usual script."""

    def whole(run: RunConfig, members: Sequence[Member] = ()) -> float:
        start, epochs = run_seconds(run, data.device, members)
        return start + length * median(epochs)

    with TemporaryDirectory() as folder:
        train(config, Path(folder), device=str(data.device), progress=False)
        epochs = np.linspace(0, config.epochs - 1, NETWORKS, dtype=int).tolist()
        members = [Member(config, Path(folder), epoch, 1 / NETWORKS) for epoch in epochs]
        plain = whole(config)
        runs = [student_config(config, "kf", members, teacher_views=views) for views in SCORED]
        ours = [whole(run, members) / plain for run in runs]
        teacher = [(load_network(member, data), member.weight) for member in members]
    workers = fastest_workers(config, data)
    scripts = [Script(config, data, workers, nets) for nets in (teacher, [])]
    taught, alone = (measure(script.epoch, small).median for script in scripts)
    return [*ours, taught / alone]


def run_seconds(
    config: RunConfig, device: torch.device, members: Sequence[Member] = ()
) -> tuple[float, list[float]]:
    """Seconds that a run, or a student of `members`, takes to start, and for each warm epoch."""
    # Training keeps its own clock, and waits until the GPU is done with the last epoch but one.
    options: dict[str, Any] = {"device": str(device), "progress": False}
    with TemporaryDirectory() as folder:
        begun = timer()
        if members:
            record = distill(config, members, Path(folder), **options)
        else:
            record = train(config, Path(folder), data=load(config, device)[0], **options)
        total, seconds = timer() - begun, record.curves["seconds"].tolist()
    return total - sum(seconds), seconds[WARM_UP:]


def bare_seconds(config: RunConfig, data: DataSet, small: bool) -> tuple[float, float]:
    """Seconds of the steps of an epoch of `train`, and of its evaluation."""
    model, labels = build_model(config, data), data.labels
    scaler = make_scaler(config, data.device)
    parts = TrainingState(model, make_optimizer(config, model), model, scaler)
    each = partial(F.cross_entropy, reduction="none")
    step = Step(config, data, parts, lambda x, b: each(x, labels[b.index]), World(), graphs=True)

    def epoch() -> None:
        step.begin(0)
        order = torch.randperm(len(labels), device=data.device)
        batches = order.tensor_split(math.ceil(len(order) / config.batch_size))
        for batch in data.batches(batches, config.augment, 0):
            step(batch, config.lr)

    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        epoch()  # once more to warm up
        alone = measure(epoch, small).median
        scored = measure(lambda: predict(model, data, data.eval_images, config.precision), small)
    return alone, scored.median
