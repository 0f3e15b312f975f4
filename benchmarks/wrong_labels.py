"""Methods made for wrong labels beside Knowledge Fusion: `python -m benchmarks.wrong_labels`.

About an hour on one core; with FMN_RUNS set it resumes where it was stopped. On the digits with
augmentation at 40% noise of both kinds: losses made for label noise, runs that are corrected for
the noise they have met, runs that teach themselves, two runs in place of one, and other students.
Each has the setting of its grid with which early stopping does best on the validation half of a
training seed that no result uses. Losses as arguments are measured alone, and the rest is kept;
cifar100 as an argument is ELR, with its paper's setting, on the first run of `fmn grid cifar`.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import note_origin
from fmnlib import RunConfig, RunRecord, fusion, knowledge_fusion, runs, train
from fmnlib.checkpoint import clear_states
from fmnlib.config import StudentConfig
from fmnlib.data import Batch, DataSet, load
from fmnlib.distillation import (
    Member,
    Teacher,
    load_network,
    predict_views,
    soft_target_loss,
    with_view_pool,
)
from fmnlib.files import write_whole
from fmnlib.fusion import fuse, single
from fmnlib.losses import begin_epoch, new_memory, progressive_self_distillation
from fmnlib.paper import grid
from fmnlib.paper.ablation import scored
from fmnlib.paper.compare import replicates
from fmnlib.paper.features import last_layer_inputs
from fmnlib.record import Result, halves
from fmnlib.recorder import provenance
from fmnlib.runs import Job
from fmnlib.stats import score
from fmnlib.training import build_model, pick_device, predict

OUT = Path(__file__).parent.parent / "results" / "wrong_labels.json"
ITEM = "wrong_labels"
NOISY = [("symmetric", 0.4), ("asymmetric", 0.4)]
SEEDS, TUNED_ON = range(5), 100
GRIDS: dict[str, list[tuple[float, ...]]] = {  # the first is the library's default
    "elr": [(3.0, 0.7), (1.0, 0.7), (3.0, 0.9), (7.0, 0.9)],
    "gce": [(0.7,), (0.3,), (0.5,), (0.9,)],
    "sce": [(0.1, 1.0), (0.5, 1.0), (1.0, 1.0), (6.0, 0.1)],
    "sat": [(0.9, 0.3), (0.9, 0.15), (0.7, 0.3)],
    "ps_kd": [(0.8,), (0.5,)],
    "coverage": [(0.8,), (0.5,)],  # not of the library: `self_distill`
}
WAYS = {
    "single": single,
    "early_stopping": fusion.early_stopping,
    "kf": knowledge_fusion,
    "anchored_kf": partial(knowledge_fusion, start="best"),
}
STUDENTS: dict[str, dict[str, Any]] = {
    "refined": {"teacher_views": 8, "soft_share": 0.5, "labels": "refined"},
    "propagated": {"teacher_views": 8, "soft_share": 0.5},
    "gated": {"teacher_views": 8},
}
NEIGHBOURS, SPREAD = 20, 0.99  # of the graph; the share of a label that is passed on


def configs(seeds: Iterable[int], **changes: Any) -> list[RunConfig]:
    """The runs of both kinds of noise, with some fields changed."""
    return replicates("quick", NOISY, list(seeds), ["augmented"], **changes)


def obtain(jobs: Sequence[Any]) -> list[RunRecord]:
    """Records, made one after the other."""
    return runs.obtain(jobs, workers=1, progress=False)


def validation(record: RunRecord) -> RunRecord:
    """The validation half of a run, by the split of its training seed."""
    assert record.config is not None
    return record.split(record.config.seed)[0]


def tuning(losses: Iterable[str] = GRIDS) -> Iterator[dict[str, Any]]:
    """Validation accuracy of early stopping with every setting of some losses' grids."""
    for loss, values in [(name, values) for name in losses for values in GRIDS[name]]:
        for record in obtain(jobs_of(loss, values, [TUNED_ON])):
            assert record.config is not None
            accuracy = float(validation(record).accuracy[record.kept].max())
            row = {"loss": loss, "parameters": values, "setting": record.config.condition}
            yield row | {"accuracy": accuracy}


def jobs_of(loss: str, values: tuple[float, ...], seeds: Iterable[int]) -> list[RunConfig | Job]:
    """The runs of both kinds of noise with one setting of a loss."""
    if loss == "coverage":
        return [covered(config, *values) for config in configs(seeds)]
    return [*configs(seeds, loss=loss, loss_parameters=values)]


def chosen(rows: Iterable[dict[str, Any]], loss: str) -> tuple[float, ...]:
    """The parameters with the best mean over both kinds of noise; of equal ones the first."""
    sums: dict[tuple[float, ...], float] = {}
    for row in rows:
        if row["loss"] == loss:
            values = tuple(row["parameters"])
            sums[values] = sums.get(values, 0.0) + row["accuracy"]
    return max(sums, key=lambda values: sums[values])


def in_every_way(name: str, jobs: Sequence[RunConfig | Job]) -> list[Result]:
    """The scores of runs in all ways of using their epochs."""
    ways = {f"{name}_{way}": choose for way, choose in WAYS.items()}
    return scored(obtain(jobs), (), ways, item=ITEM)


def of_students(name: str, kind: str, records: Sequence[RunRecord]) -> list[Result]:
    """The scores of students of runs, of a kind of `STUDENTS`."""
    students = obtain([student_of(record, kind) for record in records])
    return scored(students, (), {f"{name}_{kind}_kf": single}, item=ITEM)


def of_two_runs(config: RunConfig) -> Iterator[Result]:
    """The better of two runs by validation, and the mean of both, in several ways."""
    records = obtain([config, dataclasses.replace(config, seed=config.seed + 1000)])
    halves = [record.split(config.seed) for record in records]
    for way, choose in WAYS.items():
        found = [choose(val) for val, _ in halves]
        right = [
            float((fuse(val, f).argmax(axis=1) == val.labels).mean())
            for (val, _), f in zip(halves, found, strict=True)
        ]
        probs = [fuse(test, f) for (_, test), f in zip(halves, found, strict=True)]
        better, networks = int(right[1] > right[0]), [f.networks for f in found]
        about: dict[str, Any] = {"item": ITEM, "split": config.seed}
        about["seconds"] = sum(float(record.provenance["seconds"]) for record in records)
        test = halves[0][1]
        alone = {"method": f"better_{way}", "networks": networks[better]}
        yield score(probs[better], test, **alone, **about)
        both = {"method": f"both_{way}", "networks": sum(networks)}
        yield score(np.mean(probs, axis=0), test, **both, **about)


def propagated(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels after they have spread over a graph of features, the core of AML-KD.

    The graph joins each sample to its nearest neighbours with the cube of their cosine
    similarity; with W = D^(-1/2) (A + A^T) D^(-1/2), (I - 0.99 W) Z = Y is solved by conjugate
    gradients, and the label is the largest of a row of Z (Iscen et al., 2019).

    >>> features = np.array([[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 30)
    >>> given = np.array([0] * 20 + [1] * 35 + [0] * 5)
    >>> propagated(features, given, 2).tolist() == [0] * 30 + [1] * 30
    True
    """
    from scipy.sparse import diags, identity
    from scipy.sparse.linalg import cg
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(features)
    graph = nearest.kneighbors_graph(mode="distance")  # a sample is no neighbour of its own
    graph.data = (1 - graph.data).clip(0) ** 3
    graph = graph + graph.T
    scale = diags(np.asarray(graph.sum(axis=1)).ravel().clip(1e-12) ** -0.5)
    system = identity(len(labels)) - SPREAD * scale @ graph @ scale
    given = np.eye(classes)[labels]
    return np.stack([cg(system, column)[0] for column in given.T], axis=1).argmax(axis=1)


def features_of(teacher: Teacher, data: DataSet) -> np.ndarray:
    """Of the training images, so that their cosine is the networks' weighted mean."""
    parts = []
    for net, weight in teacher:
        inputs = last_layer_inputs(net, data, data.images)
        norm = np.linalg.norm(inputs, axis=1, keepdims=True).clip(1e-12)
        parts.append(weight**0.5 * inputs / norm)
    return np.concatenate(parts, axis=1)


def gated_loss(logits: Tensor, probs: Tensor, labels: Tensor, student: StudentConfig) -> Tensor:
    """The loss of students, whose soft term counts while it agrees with that of the labels.

    It counts for a batch if the gradients of the two terms have a positive cosine; SCKD (ICCV
    2021) compares those of layers, here they are those of the logits.

    >>> two, student = torch.zeros(2, 2), StudentConfig(temperature=1.0, soft_share=0.5)
    >>> teacher, labels = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])
    >>> gated_loss(two, teacher, labels, student), gated_loss(two, teacher, labels * 0, student)
    (tensor([0.3466, 0.3466]), tensor([0.6931, 0.6931]))
    """
    t, share = student.temperature, student.soft_share
    soft = F.softmax(probs.clamp_min(1e-12).log() / t, dim=1)
    of_soft = (logits / t).softmax(1) - soft
    of_labels = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    agree = (of_soft * of_labels).sum().detach() > 1e-12
    alone = (1 - share) * F.cross_entropy(logits, labels, reduction="none")
    return torch.where(agree, soft_target_loss(logits, probs, labels, student), alone)


def coverage_weights(right: np.ndarray) -> np.ndarray:
    """Weights of checkpoints: the samples that each gets right and no more accurate one does.

    So they are described for VISTA (Corn and Weinshall, 2026) and CAFE; `right` is `[checkpoints,
    samples]`, of equally accurate ones the first ranks higher, and the weights sum to 1.

    >>> coverage_weights(np.array([[True, True, False, False], [True, False, True, False]]))
    array([0.66666667, 0.33333333])
    """
    order = np.argsort(-right.mean(axis=1), kind="stable")
    first = right[order] & (np.cumsum(right[order], axis=0) == 1)
    weights = np.zeros(len(right))
    weights[order] = first.sum(axis=1)
    return weights / max(weights.sum(), 1)


def covered(config: RunConfig, share: float) -> Job:
    """The job of a run that is taught by its own checkpoints so far."""
    student = StudentConfig(teacher=f"coverage-{share}")
    taught = dataclasses.replace(config, student=student)
    return Job(taught, make=partial(self_distill, share=share))


def self_distill(
    config: RunConfig,
    members: Sequence[Member],
    folder: Path,
    *,
    share: float,
    device: str,
    **options: Any,
) -> RunRecord:
    """Train with the loss and the schedule of PS-KD, the sources of this method stating none.

    The soft labels t are the mean of the checkpoints of all epochs before, by `coverage_weights`
    on the validation half; each predicts the training images without augmentation once, when its
    epoch is over. The first epoch has none. What it remembers is not stored: a run that was
    interrupted begins anew.
    """
    if not (folder / "record.npz").exists():
        clear_states(folder)
    data = load(config, pick_device(device))
    chosen = torch.from_numpy(halves(len(data.eval_labels), config.seed)[0])
    model = build_model(config, data)
    kind = {"loss": "ps_kd", "loss_parameters": (share,), "student": None}
    ps_kd = dataclasses.replace(config, **kind)
    memory = new_memory(ps_kd, data.labels, data.classes)
    assert memory is not None
    past: list[Tensor] = []
    right: list[np.ndarray] = []
    seen = 0

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        nonlocal seen
        epoch, within = divmod(seen, len(data.labels))
        seen += len(batch.index)
        if epoch and not within:
            answers = predict(model, data, data.eval_images[chosen]).argmax(1)
            right.append((answers == data.eval_labels[chosen]).cpu().numpy())
            past.append(predict(model, data, data.images).softmax(1))
            model.train()
            weights = torch.tensor(coverage_weights(np.array(right)), dtype=torch.float32)
            memory.targets.copy_(torch.tensordot(weights, torch.stack(past), dims=1))
            begin_epoch(ps_kd, memory, epoch)
        labels, soft = data.labels[batch.index], memory.targets[batch.index]
        return progressive_self_distillation(logits, labels, soft, memory.share)[0]

    options |= {"device": device, "data": data, "criterion": loss, "build": lambda: model}
    return train(config, folder, **options)


def teach(
    config: RunConfig, members: Sequence[Member], folder: Path, *, kind: str, device: str
) -> RunRecord:
    """Train a student by the labels that are propagated, or with the soft term gated."""
    data = with_view_pool(config, load(config, pick_device(device)))
    teacher = [(load_network(member, data), member.weight) for member in members]
    table, labels, student = predict_views(config, data, teacher), data.labels, config.student
    assert student is not None
    if kind == "propagated":
        spread = propagated(features_of(teacher, data), labels.cpu().numpy(), data.classes)
        labels = torch.tensor(spread, device=data.device)
    loss_of = gated_loss if kind == "gated" else soft_target_loss

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return loss_of(logits, table[batch.view, batch.index], labels[batch.index], student)

    return train(config, folder, device=device, data=data, criterion=loss, progress=False)


def student_of(record: RunRecord, kind: str) -> Job:
    """The job of a student of the papers' Knowledge Fusion of a run, of a kind of `STUDENTS`."""
    assert record.config is not None
    found = knowledge_fusion(validation(record))
    if kind == "refined":
        return runs.student(record.config, "kf", found, **STUDENTS[kind])
    job = runs.student(record.config, f"kf_{kind}", found, **STUDENTS[kind])
    return dataclasses.replace(job, make=partial(teach, kind=kind))


def measured(tuned: list[dict[str, Any]]) -> Iterator[list[Result]]:
    """The scores of one group of methods after another, students last."""
    trained: dict[str, Sequence[RunConfig | Job]] = {"cross_entropy": configs(SEEDS)}
    for loss in GRIDS:
        trained[loss] = jobs_of(loss, chosen(tuned, loss), SEEDS)
    plain = obtain(trained["cross_entropy"])
    trained["glc"] = [
        runs.corrected(config, validation(record))
        for config, record in zip(configs(SEEDS), plain, strict=True)
    ]
    for name, jobs in trained.items():
        yield in_every_way(name, jobs)
    yield [result for config in configs(SEEDS) for result in of_two_runs(config)]
    robust = {"loss": "elr", "loss_parameters": chosen(tuned, "elr")}
    for noise, regime in (([("none", 0.0)], "augmented"), (NOISY, "memorising")):
        for name, changes in (("cross_entropy", {}), ("elr", robust)):
            found = replicates("quick", noise, list(SEEDS), [regime], **changes)
            yield in_every_way(name, found)
    for name in ("cross_entropy", "elr", "gce", "glc"):
        yield of_students(name, "refined", obtain(trained[name]))
    for kind in ("propagated", "gated"):
        yield of_students("cross_entropy", kind, plain)
    for name in ("sce", "sat", "ps_kd"):
        yield of_students(name, "refined", obtain(trained[name]))


def on_cifar100() -> list[Result]:
    """ELR in the place of cross-entropy in the first cell of the grid `cifar`."""
    plain, ways = grid.cells("cifar")[0].config, WAYS | {"best_probs": fusion.best_epochs}
    config = dataclasses.replace(plain, loss="elr", loss_parameters=(7.0, 0.9))
    named = {f"elr_{way}": choose for way, choose in ways.items()}
    return scored(obtain([config]), [0], named, item=ITEM)


def write(rows: dict[str, Any], part: str) -> None:
    """Write all that is measured, and where the part that is new came from."""
    write_whole(OUT, f"{json.dumps(rows, indent=1)}\n".encode())
    note_origin(OUT, part, provenance(torch.device("cpu"), 0.0))


def main() -> None:
    """Measure everything, or some losses alone; write what there is after each group."""
    alone = sys.argv[1:]
    rows = {"tuning": [], "results": []} | (json.loads(OUT.read_text()) if OUT.exists() else {})
    if alone == ["cifar100"]:
        rows["cifar100"] = [dataclasses.asdict(result) for result in on_cifar100()]
        write(rows, "cifar100")
        return
    tuned = [row for row in rows["tuning"] if alone and row["loss"] not in alone]
    tuned += tuning(alone or GRIDS)
    results = rows["results"] if alone else []
    groups = (in_every_way(loss, jobs_of(loss, chosen(tuned, loss), SEEDS)) for loss in alone)
    for group in groups if alone else measured(tuned):
        found = [dataclasses.asdict(result) for result in group]
        again = {(row["setting"], row["method"]) for row in found}
        results = [row for row in results if (row["setting"], row["method"]) not in again] + found
        write(rows | {"tuning": tuned, "results": results}, found[0]["method"])
        print(results[-1]["method"], flush=True)


if __name__ == "__main__":
    main()
