"""How well wrong training labels are found: `python -m benchmarks.labels`, about 40 minutes.

One run and its checkpoints, as `fmn labels` ranks them, against five-fold cross-validation with
cleanlab's scores (`pip install cleanlab`), which trains five networks of the same recipe more.
Fashion-MNIST and CIFAR-100 take part where their files are there (`FMN_DATA`). Seconds are those
that the processor works, of this process; with FMN_RUNS set, networks are trained once.
"""

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import note_origin
from fmnlib import InputError, RunConfig, RunRecord, knowledge_fusion, labels, runs, train
from fmnlib.config import Paused
from fmnlib.data import DataSet, load
from fmnlib.files import write_whole
from fmnlib.fusion import Fusion, best_epochs, early_stopping, single
from fmnlib.paper.compare import replicates
from fmnlib.recorder import provenance

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "labels.json"
FOLDS = 5
NOISY = [("symmetric", 0.4), ("asymmetric", 0.4)]
FASHION = {"train_samples": 5_000, "eval_samples": 2_000, "epochs": 30}
CIFAR = {"width": 0.25, "train_samples": 10_000, "eval_samples": 5_000, "epochs": 100}


def cases(chosen: str) -> list[RunConfig]:
    """The runs of a data set: five seeds of each noise of the digits, fewer of the others."""
    if chosen == "digits":
        return replicates("quick", NOISY, range(5), ["augmented"])
    if chosen == "fashion_mnist":
        every = replicates("standard", NOISY, range(3), ["augmented"], **FASHION)
        return sorted(every, key=lambda config: config.seed)
    human = {"precision": "bfloat16", "noise_seed": 0, "seed": 0, "noise": "human"}
    return [RunConfig.of_profile("paper", **CIFAR, **human)]


def mixtures(val: RunRecord) -> dict[str, Fusion]:
    """What may judge the labels, chosen on a validation half; anchored is `fmn labels`'s own."""
    return {
        "single": single(val),
        "early_stopping": early_stopping(val),
        "best_probs": best_epochs(val),
        "kf": knowledge_fusion(val),
        "anchored_kf": knowledge_fusion(val, start="best"),
    }


def cross_validated(
    config: RunConfig, data: DataSet, folder: Path, deadline: float = math.inf
) -> tuple[np.ndarray, float]:
    """Probabilities `[samples, classes]` of networks that were trained without these samples.

    And the seconds of their training, which are written beside each. Paused at the deadline.
    """
    samples, seconds = len(data.labels), 0.0
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(config.seed))
    probs = np.empty((samples, data.classes))
    for fold, held in enumerate(order.chunk(FOLDS)):
        rest = torch.tensor(np.setdiff1d(np.arange(samples), held.numpy()))
        assert isinstance(data.images, torch.Tensor)
        part = dataclasses.replace(
            data,
            images=data.images[rest],
            labels=data.labels[rest],
            flipped=data.flipped[rest],
            eval_images=data.images[held],
            eval_labels=data.labels[held],
        )
        last = config.keeping(config.epochs)
        place, started = folder / f"fold{fold}", time.process_time()
        spent = place / "seconds.txt"
        if place.exists() and not spent.exists():  # it was killed: its time is not known
            shutil.rmtree(place)
        before = float(spent.read_text()) if spent.exists() else 0.0
        done = (place / "record.npz").exists()
        try:
            record = train(last, place, data=part, deadline=deadline)
        finally:  # trained, or paused
            if place.exists() and not done:
                spent.write_text(f"{before + time.process_time() - started:.2f}")
        seconds += float(spent.read_text())
        assert record.probs is not None
        probs[held.numpy()] = record.probs[-1]
    return probs / probs.sum(axis=1, keepdims=True), seconds


def measured(config: RunConfig, deadline: float = math.inf) -> Iterator[dict[str, str | float]]:
    """A row for each way to rank the labels of a run."""
    from cleanlab.count import num_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.metrics import roc_auc_score

    data, path = load(config), runs.folder(config)
    wrong = data.flipped.numpy()
    about = {"dataset": config.dataset, "setting": config.setting, "seed": config.seed}
    about["wrong"] = float(wrong.mean())
    record = train(config, path, deadline=deadline)
    for name, fusion in mixtures(record.split(config.seed)[0]).items():
        started = time.process_time()
        samples = labels.of_run(path, record, fusion, "cpu")
        table = labels.suspects(samples.probs, samples.given)
        seconds = time.process_time() - started
        row = about | {"method": name, "seconds": seconds, "rate": labels.noise_rate(table)}
        yield row | labels.detection(table, wrong)
    probs, seconds = cross_validated(config, data, path.with_name(f"{path.name}-folds"), deadline)
    given = data.labels.numpy()
    rate = num_label_issues(given, probs) / len(given)
    for name in ("self_confidence", "normalized_margin"):
        score = 1 - get_label_quality_scores(given, probs, method=name)
        first = np.argsort(-score, kind="stable")[: round(rate * len(given))]
        found = {"AUROC": roc_auc_score(wrong, score), "precision": wrong[first].mean()}
        row = about | {"method": f"cleanlab_{name}", "seconds": seconds, "rate": rate}
        yield row | {key: float(value) for key, value in found.items()}


def main() -> None:
    """Measure the data sets that are named, run by run; what was measured of others is kept."""
    names = ["digits", "fashion_mnist", "cifar100"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="*", default=names, help="of " + ", ".join(names))
    told = "stop after the last epoch that ends within this time; the same command resumes"
    parser.add_argument("--max-minutes", type=float, default=math.inf, help=told)
    rows = json.loads(OUT.read_text()) if OUT.exists() else []
    given = parser.parse_args()
    if unknown := ", ".join(set(given.datasets) - set(names)):
        parser.error(f"no data set {unknown}; choose of {', '.join(names)}")
    deadline = time.monotonic() + 60 * given.max_minutes
    for config in (case for name in given.datasets for case in cases(name)):
        try:
            fresh = [*measured(config, deadline)]
        except Paused as paused:
            print(paused)
            break
        except InputError as error:
            print(f"left out: {error}")
            continue
        print(*fresh, sep="\n", flush=True)
        about = ("dataset", "setting", "seed")
        kept = [row for row in rows if any(row[key] != fresh[0][key] for key in about)]
        rows = kept + fresh
        write_whole(OUT, f"{json.dumps(rows, indent=1)}\n".encode())
        about = provenance(torch.device("cpu"), sum(row["seconds"] for row in fresh))
        note_origin(OUT, f"{config.dataset} {config.setting} {config.seed}", about)


if __name__ == "__main__":
    main()
