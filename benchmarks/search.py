"""Time and memory of the searches for a fusion, on a synthetic run that forgets."""

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.special import softmax

from benchmarks.machine import Machine, measure
from benchmarks.report import Row, row
from fmnlib import RunRecord
from fmnlib.fusion import Fusion, accuracy, exhaustive_fusion, knowledge_fusion

GRID = np.arange(0, 1.005, 0.01)
TRIED = 2  # epochs that the plain grid is timed on
WINDOW = 3  # epochs that one pick of the papers' rule averages


def trajectories(epochs: int, samples: int, classes: int) -> RunRecord:
    """Logits that wander, so that epochs agree with their neighbours and samples are forgotten."""
    rng = np.random.default_rng(0)
    labels, rows = rng.integers(0, classes, samples), np.arange(samples)
    probs = np.empty((epochs, samples, classes), np.float16)
    memory, ease = np.float32(0.95), rng.normal(4.6, 2, samples)
    lasting = 0.7 * rng.standard_normal((samples, classes), np.float32)
    passing = rng.standard_normal((samples, classes), np.float32)
    for epoch, progress in enumerate(np.linspace(0, 1, epochs, dtype=np.float32)):
        step = rng.standard_normal((samples, classes), np.float32)
        passing = memory * passing + np.sqrt(1 - memory**2) * step
        logits = lasting + passing
        logits[rows, labels] += ease * (1 - np.exp(-4 * progress)) - 0.4 * progress
        logits *= 1 + 2 * progress
        probs[epoch] = softmax(logits, axis=1)
    return RunRecord.from_arrays(probs, labels)


def plain_grid(record: RunRecord) -> None:
    """One pick of the exhaustive search as numpy code writes it at first, for some epochs."""
    probs, labels = record.probs, record.labels
    assert probs is not None
    fused = probs[-1].astype(np.float64)
    for epoch in np.linspace(1, record.epochs - 2, TRIED).astype(int):
        candidate = probs[epoch - 1 : epoch + 2].mean(axis=0, dtype=np.float64)
        for share in GRID:
            (((1 - share) * fused + share * candidate).argmax(axis=1) == labels).mean()


def search(machine: Machine, repeats: int, small: bool) -> Iterator[Row]:
    """Seconds of a search; the best is to read what a pick must see: all epochs, or a window."""
    if machine.device.type != "cpu":  # a search works on the CPU
        machine = Machine.of(torch.device("cpu"))
    shape = (20, 200, 10) if small else (200, 5000, 100)
    record = trajectories(*shape)
    searches: dict[str, Callable[[], Fusion]] = {
        "the papers' rule": lambda: knowledge_fusion(record),
        "the papers' rule and grid": lambda: knowledge_fusion(record, grid=GRID),
        "exhaustive, one pick": lambda: exhaustive_fusion(record, max_picks=1),
        "exhaustive": lambda: exhaustive_fusion(record),
    }
    tried = measure(lambda: plain_grid(record), small).times
    usual = {"exhaustive, one pick": [seconds * shape[0] / TRIED for seconds in tried]}
    for name, call in searches.items():
        times = [seconds for _ in range(repeats) for seconds in measure(call, small).times]
        tracemalloc.start()  # apart from timing, for it costs time
        found = call()
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        picks, epochs = len(found.picks), shape[0] if "exhaustive" in name else WINDOW
        best, bound = machine.roofline(0, 2 * epochs * shape[1] * shape[2] * picks)
        result = f"{picks} picks, accuracy {accuracy(record, found):.3f}; peak {peak:.0f} MB"
        told = {"best": best, "bound": bound, "note": f"CPU, 1 thread; {result}"}
        yield row(name, "s", times, usual.get(name, ()), **told)
