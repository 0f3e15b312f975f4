"""The first minutes on a GPU: does all that no CPU can show hold there? A line for each check.

`python -m benchmarks.first_gpu` runs them all; names of checks run those. The first that would
say something else than the stand-in of the tests is the first thing to mend.
"""

import argparse
import copy
import dataclasses
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.training import load
from fmnlib import InputError, RunConfig, RunRecord
from fmnlib.config import Paused
from fmnlib.data import Batch, DataSet
from fmnlib.graph import EAGER_CALLS
from fmnlib.models import number_format
from fmnlib.parallel import SINGLE_PROCESS
from fmnlib.step import Step, TrainingState, make_optimizer, make_scaler
from fmnlib.training import build_model, pick_device, train

# Batches of 63 and, twice an epoch, of 62, of images that are augmented.
SMALL = RunConfig(
    train_samples=376, eval_samples=50, batch_size=64, epochs=4, augment="crop", lr=0.02
)
WAYS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
    "average": {"ema": 0.9},
    "clipping": {"clip_norm": 1.0},
    "float16": {"precision": "float16"},
    "float32": {"precision": "float32"},
    "resnet8": {"model": "resnet8"},
}
CLOSE = 0.05  # relative difference of losses; sums run in any order on a GPU


def run(config: RunConfig, device: torch.device, **options: Any) -> RunRecord:
    with TemporaryDirectory() as folder:
        return train(config, Path(folder), device=str(device), progress=False, **options)


def losses(config: RunConfig, device: torch.device, **options: Any) -> np.ndarray:
    return run(config, device, **options).curves["train_loss"]


def stepper(
    config: RunConfig, device: torch.device, graphs: bool = True
) -> tuple[Step, Iterator[Batch]]:
    """Steps of a run outside of its loop, and batches without end."""
    data = load(config, device)[0]
    model, labels = build_model(config, data), data.labels
    scaler = make_scaler(config, data.device)
    parts = TrainingState(model, make_optimizer(config, model), model, scaler)

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(logits, labels[batch.index], reduction="none")

    step = Step(config, data, parts, loss, SINGLE_PROCESS, graphs)
    step.begin(0)
    return step, endless(config, data)


def endless(config: RunConfig, data: DataSet) -> Iterator[Batch]:
    order = torch.randperm(len(data.labels), device=data.device)
    batches = order.tensor_split(math.ceil(len(order) / config.batch_size))
    while True:
        yield from data.batches(batches, config.augment, 0)


def take(step: Step, batches: Iterator[Batch], count: int) -> None:
    for _ in range(count):
        step(next(batches), step.config.lr)


@contextmanager
def saying() -> Iterator[list[str]]:
    """What is said about graphs."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if "CUDA graphs" in str(w.message)]


def formats(device: torch.device) -> str:
    """The number format is the one that the GPU has units for."""
    capability = torch.cuda.get_device_capability(device)
    return f"{capability[0]}.{capability[1]}: {number_format('auto', device)}"


def replays(device: torch.device) -> str:
    """Replayed steps are the called ones, in every way of training."""
    worst = {}
    for name, changes in WAYS.items():
        config = dataclasses.replace(SMALL, **changes)
        with saying() as said:
            replayed, called = (losses(config, device, graphs=graphs) for graphs in (True, False))
        assert not said, f"{name}: {said[0]}"
        worst[name] = float(np.abs(replayed / called - 1).max())
        assert worst[name] < CLOSE, f"{name}: losses differ by {worst[name]:.2g}"
    return ", ".join(f"{name} {value:.1g}" for name, value in worst.items())


def waits(device: torch.device) -> str:
    """No step makes the host wait for the GPU; torch raises where one does."""
    step, batches = stepper(SMALL, device)
    take(step, batches, 12 * (EAGER_CALLS + 2))  # both sizes are proven
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(step, batches, 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        step.close()
    return "30 steps"


def resume(device: torch.device) -> str:
    """A run that is paused after every epoch ends as one that is not."""
    config, whole = SMALL, losses(SMALL, device)
    with TemporaryDirectory() as folder:
        for epoch in range(config.epochs):
            deadline = math.inf if epoch + 1 == config.epochs else 0.0
            try:
                record = train(
                    config, Path(folder), device=str(device), progress=False, deadline=deadline
                )
            except Paused:
                continue
    worst = float(np.abs(record.curves["train_loss"] / whole - 1).max())
    assert worst < CLOSE, f"losses differ by {worst:.2g}"
    return f"losses differ by {worst:.1g}"


def overflow(device: torch.device) -> str:
    """A first step in float16 that overflows changes neither weights nor momentum."""
    step, batches = stepper(dataclasses.replace(SMALL, precision="float16"), device)
    step.parts.scaler.update(2.0**60)
    before = copy.deepcopy(step.parts.model.state_dict())
    take(step, batches, 1)
    step.close()
    after = step.parts.tensors()
    weights = [name for name, _ in step.parts.model.named_parameters()]
    changed = [name for name in weights if not torch.equal(after[f"model.{name}"], before[name])]
    assert not changed, f"it changes {', '.join(changed)}"
    momentum = [value for name, value in after.items() if name.endswith("momentum_buffer")]
    assert momentum, "there is no momentum to look at"
    assert not any(value.any() for value in momentum), "it changes the momentum"
    return f"the scale is {float(after['scaler._scale']):.3g}"


def streams(device: torch.device) -> str:
    """Eight runs in one process, each with its writer beside it."""
    with saying() as said:
        ends = [losses(dataclasses.replace(SMALL, seed=s), device)[-1] for s in range(8)]
    assert not said, said[0]
    assert np.isfinite(ends).all(), f"losses are {ends}"
    return f"losses from {min(ends):.2g} to {max(ends):.2g}"


def fallback(device: torch.device) -> str:
    """A capture that fails leaves a process that trains, draws and captures again."""
    mean = Step.mean

    def bad(self: Step, loss: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            loss.sum().item()
        return mean(self, loss)

    Step.mean = bad  # type: ignore[method-assign]
    try:
        with saying() as said:
            failed = losses(SMALL, device)
    finally:
        Step.mean = mean  # type: ignore[method-assign]
    assert len(said) == 1, f"it says {said}"
    torch.randperm(5, device=device)
    F.dropout(torch.ones(9, device=device))
    with saying() as then:
        again = losses(SMALL, device)
    assert not then, f"afterwards: {then[0]}"
    assert np.abs(failed / again - 1).max() < CLOSE, f"losses are {failed} and {again}"
    return said[0]


def devices(device: torch.device) -> str:
    """A second GPU in the same process learns as the first."""
    count = torch.cuda.device_count()
    if count < 2:
        return "one GPU, not checked"
    with saying() as said:
        one, other = (losses(SMALL, torch.device("cuda", number)) for number in (0, count - 1))
    assert not said, said[0]
    assert np.abs(one / other - 1).max() < CLOSE, f"losses are {one} and {other}"
    return f"losses of {count} GPUs"


def speed(device: torch.device) -> str:
    """Seconds of the steps of an epoch of the paper's network, called and replayed."""
    config, told = RunConfig.of_profile("paper"), []
    for name, graphs in (("called", False), ("replayed", True)):
        torch.cuda.reset_peak_memory_stats(device)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            step, batches = stepper(config, device, graphs)
            take(step, batches, 30)
            torch.cuda.synchronize(device)
            begun = time.perf_counter()
            take(step, batches, 200)
            asked = (time.perf_counter() - begun) / 200
            torch.cuda.synchronize(device)
            done = (time.perf_counter() - begun) / 200
        step.close()
        epoch = done * math.ceil(len(step.data.labels) / config.batch_size)
        memory = torch.cuda.max_memory_reserved(device) / 2**30
        told.append(
            f"{name} {epoch:.2f} s an epoch, {done * 1e3:.2f} ms a step, "
            f"{asked * 1e3:.2f} of them Python's, {memory:.1f} GiB"
        )
    return "; ".join(told)


CHECKS: dict[str, Callable[[torch.device], str]] = {
    check.__name__: check
    for check in (formats, replays, waits, resume, overflow, streams, fallback, devices, speed)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.first_gpu", description=__doc__)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}; all if none")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:1")
    given = parser.parse_args()
    if unknown := ", ".join(set(given.checks) - set(CHECKS)):
        parser.error(f"no check {unknown}; choose of {', '.join(CHECKS)}")
    try:
        device = pick_device(given.device)
    except InputError as error:
        parser.error(str(error))
    if device.type != "cuda":
        parser.error(f"device is {given.device!r}; the checks are of a GPU, such as cuda")
    print(torch.cuda.get_device_name(device), torch.__version__, torch.backends.cudnn.version())
    failed = False
    for name in given.checks or CHECKS:
        begun = time.perf_counter()
        try:
            good, word = "passed", CHECKS[name](device)
        except Exception as error:
            told = traceback.format_exception(error, limit=-3)
            good, word = (
                "FAILED",
                str(error) if isinstance(error, AssertionError) else "".join(told),
            )
            failed = True
        print(f"{good} {name} ({time.perf_counter() - begun:.0f} s): {word}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
