"""How often `fmnlib.diagnose` raises an alarm: `python -m benchmarks.verdict`, about 5 minutes.

Simulated runs, whose truth is known, and real ones: those of the book, and a network that learns
clean Fashion-MNIST where its files are there (`FMN_DATA`).
"""

import collections
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from scipy.special import softmax

from fmnlib import InputError, RunConfig, RunRecord, diagnose, train
from fmnlib.files import write_whole
from fmnlib.stats import readable

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "verdict.json"
RUNS = 100  # of each simulated case
SAMPLES = 2000  # half of which are diagnosed
CLEAN = RunConfig.of_profile(
    "standard", model="convnet", width=2.0, train_samples=5_000, epochs=12
)


def churning(seed: int, classes: int, epochs: int, correlation: float = 0.0) -> RunRecord:
    """A stationary run: the logits of an epoch are the network's own and some noise.

    Args:
        seed: Of everything.
        classes: Number of classes.
        epochs: Number of epochs.
        correlation: Of the noise of one epoch with that of the next.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(SAMPLES) % classes)
    own, noise = rng.normal(size=(2, SAMPLES, classes))
    own[np.arange(SAMPLES), labels] += 2.5 + np.log10(classes)
    probs = np.empty((epochs, SAMPLES, classes), np.float16)
    for epoch in range(epochs):
        fresh = rng.normal(size=noise.shape)
        noise = correlation * noise + (1 - correlation**2) ** 0.5 * fresh
        probs[epoch] = softmax(2 * (own + noise), axis=1)
    return _record(probs, labels)


def changing(seed: int, lost: float, learned: float = 0.0, classes: int = 10) -> RunRecord:
    """Twenty epochs that churn; after the twelfth, a share is lost and another one learned."""
    record = churning(seed, classes, 20)
    assert record.probs is not None
    place = np.random.default_rng([seed, 1]).random(SAMPLES)
    gone = (place < lost) & (np.arange(20)[:, None] >= 12)
    still = (place >= lost) & (place < lost + learned) & (np.arange(20)[:, None] < 12)
    probs, places = record.probs.copy(), np.arange(SAMPLES)
    for epoch, hidden in enumerate(gone | still):  # wrong, and not sure of it
        rows, right = places[hidden], record.labels[hidden]
        unsure = np.full((len(rows), classes), 0.2 / classes)
        unsure[np.arange(len(rows)), right] += 0.36
        unsure[np.arange(len(rows)), (right + 1) % classes] += 0.44
        probs[epoch, rows] = unsure
    return _record(probs, record.labels)


def rising(seed: int) -> RunRecord:
    """Two epochs of independent errors, 85% and 90% right."""
    rng, labels = np.random.default_rng(seed), np.arange(SAMPLES) % 10
    right = rng.random((2, SAMPLES)) < [[0.85], [0.9]]
    return _record(np.eye(10)[np.where(right, labels, (labels + 1) % 10)], labels)


def guessing(seed: int, classes: int) -> RunRecord:
    """Predictions that have nothing to do with the labels."""
    rng = np.random.default_rng(seed)
    return _record(
        np.eye(classes)[rng.integers(0, classes, (20, SAMPLES))], np.arange(SAMPLES) % classes
    )


def copied(record: RunRecord, copies: int) -> RunRecord:
    """Some of the samples, each several times, with groups that tell which are copies."""
    assert record.probs is not None
    groups = np.arange(SAMPLES) // copies
    return _record(record.probs[:, groups], record.labels[groups], groups)


def _record(probs: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> RunRecord:
    record = RunRecord.from_arrays(probs, labels, groups=groups)
    return record.take(np.arange(SAMPLES), "val")


def simulated() -> Iterator[tuple[str, str, Iterable[RunRecord]]]:
    """Name, truth and runs of each case whose truth is known."""
    seeds = range(RUNS)
    for classes in (2, 10, 200):
        name = f"stationary, independent noise, {classes} classes"
        yield name, "none", (churning(s, classes, 20) for s in seeds)
    yield "stationary, independent noise, 6 epochs", "none", (churning(s, 10, 6) for s in seeds)
    name = "stationary, noise that lasts (correlation 0.5)"
    yield name, "none", (churning(s, 10, 20, 0.5) for s in seeds)
    name = "stationary, each sample five times, with groups"
    yield name, "none", (copied(churning(s, 10, 20), 5) for s in seeds)
    yield "two epochs that rise from 85 to 90%", "none", (rising(s) for s in seeds)
    yield "random predictions, 10 classes", "refused", (guessing(s, 10) for s in seeds)
    for share in (0.03, 0.08, 0.15):
        name = f"{share:.0%} lost, nothing learned"
        yield name, "classic", (changing(s, share) for s in seeds)
    for share in (0.03, 0.08, 0.15):
        name = f"{share:.0%} lost, as much learned"
        yield name, "local", (changing(s, share, share) for s in seeds)
    name = "10.8% lost, two classes"
    yield name, "classic", (changing(s, 0.108, classes=2) for s in seeds)


def real() -> Iterator[tuple[str, str, Iterable[RunRecord]]]:
    """Name and runs of each experiment of the book; their truth is not known."""
    found: dict[str, list[RunRecord]] = collections.defaultdict(list)
    common = {"seed", "noise_seed", "noise", "noise_rate", "augment", "epochs", "keep_every"}
    common |= {"dataset", "model", "width", "train_samples", "eval_samples", "precision"}
    names = {"cifar100": "CIFAR-100", "fashion_mnist": "Fashion-MNIST", "digits": "digits"}
    results = ROOT / "results"
    for file in [*sorted(results.glob("*/records/*.npz")), *sorted(results.glob("reference/*"))]:
        record = RunRecord.load(file)
        config = record.config
        if config is None or config.student or config.dataset not in names:
            continue
        if config.dataset == "digits" and config.changes().keys() - common:
            continue  # an ablation
        if config.seed >= 1000 or (config.dataset == "digits" and len(record.kept) < 20):
            continue
        what = f"{names[config.dataset]}, {config.model}, {readable(config.condition)}"
        found[what].append(record)
    for name, records in sorted(found.items()):
        yield name, "", records
    try:
        with tempfile.TemporaryDirectory() as folder:
            seeds = (dataclasses.replace(CLEAN, seed=s) for s in range(3))
            runs = [train(config, Path(folder, config.id)) for config in seeds]
        yield "Fashion-MNIST, convnet, clean, accuracy rises", "none", runs
    except InputError as error:
        print(f"left out: {error}")


def main() -> None:
    """Diagnose the runs of every case and write how many have which verdict."""
    rows = []
    for name, truth, records in itertools.chain(simulated(), real()):
        counts: collections.Counter[str] = collections.Counter()
        for record in records:
            try:
                counts[diagnose(record).verdict] += 1
            except InputError:
                counts["refused"] += 1
        row = {"case": name, "truth": truth, "runs": counts.total()}
        rows.append(row | {v: counts[v] for v in ("none", "local", "classic", "refused")})
        print(rows[-1], flush=True)
        write_whole(OUT, f"{json.dumps(rows, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
