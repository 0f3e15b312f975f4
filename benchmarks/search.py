"""Time and memory of the searches for a fusion, on a synthetic run that forgets."""

import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from benchmarks.machine import Machine
from benchmarks.measure import Row, Spread
from fmnlib import RunRecord
from fmnlib.fusion import Fusion, accuracy, exhaustive_fusion, knowledge_fusion

__all__ = ["search"]

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
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs[epoch] = weights / weights.sum(axis=1, keepdims=True)
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


def search(machine: Machine, repeats: int, small: bool) -> list[Row]:
    """Seconds of a search in 200 epochs of 5,000 samples and 100 classes, in half precision.

    The usual script tries a grid of shares for every epoch in plain numpy, for one pick. The floor
    reads the probabilities that a pick must see: those of all epochs, or of one window.
    """
    shape = (20, 200, 10) if small else (200, 5000, 100)
    record = trajectories(*shape)
    usual = [s * record.epochs / TRIED for s in measure(lambda: plain_grid(record), 1)[0]]
    searches: dict[str, Callable[[], Fusion]] = {
        "the papers' rule": lambda: knowledge_fusion(record),
        "the papers' rule and grid": lambda: knowledge_fusion(record, grid=GRID),
        "exhaustive, one pick": lambda: exhaustive_fusion(record, max_picks=1),
        "exhaustive": lambda: exhaustive_fusion(record),
    }
    rows = []
    for name, call in searches.items():
        seconds, peak, found = measure(call, repeats)
        assert found is not None
        result = f"{len(found.picks)} picks, accuracy {accuracy(record, found):.3f}"
        epochs = shape[0] if "exhaustive" in name else WINDOW
        floor, bound = machine.seconds(0, 2 * epochs * shape[1] * shape[2] * len(found.picks))
        rows.append(Row("search", name, "s", Spread.of(seconds),
                        Spread.of(usual) if name == "exhaustive, one pick" else None, floor, bound,
                        "CPU, 1 thread, float16 to float64",
                        f"{result}; peak {peak:.0f} MB"))  # fmt: skip
    return rows


def measure(
    call: Callable[[], Fusion | None], repeats: int
) -> tuple[list[float], float, Fusion | None]:
    """Wall seconds of each call; then peak megabytes, in a pass of its own, for it costs time."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 1e6, found
