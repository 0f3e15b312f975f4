"""Time and memory of the searches for a fusion, on a synthetic run that forgets.

    python benchmarks/search.py [--epochs 200] [--samples 5000] [--classes 100]

On one core of a Xeon server the papers' rule takes 0.1 s, the exhaustive search 6 s.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from fmnlib import RunRecord
from fmnlib.fusion import Fusion, accuracy
from fmnlib.scores import forget_fraction
from fmnlib.search import exhaustive_fusion, knowledge_fusion

GRID = np.arange(0, 1.005, 0.01)
TRIED = 4  # epochs that the plain grid is timed on


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


def measure(search: Callable[[], Fusion | None]) -> tuple[float, float, float, Fusion | None]:
    """CPU and wall seconds, the best of as many runs as a second holds; then peak megabytes."""
    cpu = wall = np.inf
    begun = time.perf_counter()
    while cpu == np.inf or time.perf_counter() - begun < 1:
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        found = search()
        wall = min(wall, time.perf_counter() - wall_start)
        cpu = min(cpu, time.process_time() - cpu_start)
    tracemalloc.start()  # in a pass of its own, for it costs time
    search()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return cpu, wall, peak / 1e6, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=100)
    size = parser.parse_args()
    record = trajectories(size.epochs, size.samples, size.classes)
    forgotten = forget_fraction(record.correct).max()
    print(f"{size.epochs} epochs x {size.samples:,} samples x {size.classes} classes, float16")
    print(f"accuracy at the end {record.accuracy[-1]:.4f}, most forgotten {forgotten:.4f}\n")
    searches: dict[str, Callable[[], Fusion | None]] = {
        "knowledge_fusion": lambda: knowledge_fusion(record),
        "knowledge_fusion, grid of 0.01": lambda: knowledge_fusion(record, grid=GRID),
        "exhaustive_fusion": lambda: exhaustive_fusion(record),
        "exhaustive_fusion, one pick": lambda: exhaustive_fusion(record, max_picks=1),
        f"numpy grid, one pick: {TRIED} epochs, scaled": lambda: plain_grid(record),
    }
    print(f"{'search':38}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}{'picks':>7}{'accuracy':>10}")
    for name, search in searches.items():
        cpu, wall, peak, found = measure(search)
        if found is None:
            cpu, wall, result = cpu * size.epochs / TRIED, wall * size.epochs / TRIED, ""
        else:
            result = f"{len(found.picks):7}{accuracy(record, found):10.4f}"
        print(f"{name:38}{cpu:8.2f}{wall:8.2f}{peak:9.1f}{result}", flush=True)


if __name__ == "__main__":
    main()
