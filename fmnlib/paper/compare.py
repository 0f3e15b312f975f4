"""The methods of the papers' tables, side by side on the same runs and the same halves.

`compare` scores what one run and an independent ensemble give. `compare_protocols` scores methods
that change the training (AAAI Table 3): each is a config, and weights over epochs. Snapshot
ensembles and FGE average the probabilities of the networks that have weight, SWA averages their
parameters; EMA averages parameters at every step, so that its run records the average itself.
`compare_students` and `try_losses` vary the teacher and the loss of a student.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmnlib import fusion as methods
from fmnlib import runs
from fmnlib.config import TAIL, InputError, RunConfig
from fmnlib.distillation import Member, student_config
from fmnlib.fusion import Fusion, fuse, knowledge_fusion, single
from fmnlib.record import Result, RunRecord
from fmnlib.runs import Job
from fmnlib.stats import score


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One run on one split, and what was chosen on its validation half."""

    item: str
    config: RunConfig
    split: int
    ensemble: Sequence[RunRecord]
    fusions: Mapping[str, Fusion]
    teacher_views: int

    def jobs(self) -> list[Job]:
        """The networks that have to be made from the fusion."""
        kf = self.fusions["kf"]
        student = runs.student(self.config, "kf", kf, teacher_views=self.teacher_views)
        return [runs.averaged(self.config, "kf", kf), student]


def compare(
    configs: Sequence[RunConfig],
    *,
    item: str,
    splits: Sequence[int] = (0, 1, 2),
    members: int = 3,
    teacher_views: int = 0,
    fresh: bool = False,
) -> list[Result]:
    """Score single networks, ensembles and students on the runs of these configs.

    What is chosen (epochs, shares) is chosen on the validation half of a split; scores are of its
    test half. The ensembles over epochs have as many networks as Knowledge Fusion took.

    Args:
        configs: One for each setting and seed.
        item: Name of the experiment, such as label_noise.
        splits: Seeds of the splits.
        members: Size of the independent ensemble.
        teacher_views: As in `StudentConfig`.
        fresh: Leave the committed records aside and train.
    """
    ensembles = [independent_members(config, members) for config in configs]
    records = runs.obtain([config for ensemble in ensembles for config in ensemble], fresh=fresh)
    cells = []
    for number, config in enumerate(configs):
        ensemble = records[number * members : (number + 1) * members]
        for split in splits:
            val, _ = ensemble[0].split(split)
            cells.append(_Cell(item, config, split, ensemble, one_run_fusions(val), teacher_views))
    made = runs.obtain([job for cell in cells for job in cell.jobs()], fresh=fresh)
    pairs = zip(made[::2], made[1::2], strict=True)
    return [
        result
        for cell, (averaged, student) in zip(cells, pairs, strict=True)
        for result in _score(cell, averaged, student)
    ]


def independent_members(config: RunConfig, members: int) -> list[RunConfig]:
    """The config, and its like with other training seeds on the same noisy labels.

    Seeds are a thousand apart, so that the ensembles of neighbouring seeds share no network. Of
    the others only the final network is kept.
    """
    seeds = [config.seed + 1000 * number for number in range(1, members)]
    final = dataclasses.replace(config, keep_every=config.epochs)
    return [config, *(dataclasses.replace(final, seed=seed) for seed in seeds)]


def one_run_fusions(val: RunRecord) -> dict[str, Fusion]:
    """The methods that need one run alone, chosen on its validation half."""
    kf = knowledge_fusion(val)
    return {
        "single": methods.single(val),
        "early_stopping": methods.early_stopping(val),
        "horizontal": methods.horizontal(val, kf.networks),
        "fixed_jumps": methods.fixed_jumps(val, kf.networks),
        "kf_one": knowledge_fusion(val, max_picks=1),
        "kf": kf,
    }


def _score(cell: _Cell, averaged: RunRecord, student: RunRecord) -> list[Result]:
    """Every method on the test half, with the networks and the training time that it takes."""
    test = cell.ensemble[0].split(cell.split)[1]
    once = seconds(cell.ensemble[0])
    made = {
        method: (fuse(test, fusion), fusion.networks, once)
        for method, fusion in cell.fusions.items()
    }
    finals = [fuse(half, methods.single(half)) for half in _test_halves(cell.ensemble, cell.split)]
    ensemble_seconds = sum(map(seconds, cell.ensemble))
    made["independent"] = (np.mean(finals, axis=0), len(finals), ensemble_seconds)
    for method, record in (("averaged_kf", averaged), ("distilled_kf", student)):
        half = record.split(cell.split)[1]
        probs = fuse(half, methods.single(half))
        made[method] = (probs, 1, once + seconds(record))
    about: dict[str, Any] = {"item": cell.item, "split": cell.split}
    return [
        score(probs, test, method=method, networks=networks, seconds=cost, **about)
        for method, (probs, networks, cost) in made.items()
    ]


def score_halves(
    record: RunRecord,
    weights: Fusion,
    splits: Sequence[int],
    *,
    item: str,
    method: str,
    cost: float,
) -> list[Result]:
    """Score weights that were fixed beforehand on the test half of each split.

    Args:
        record: The run, whose config names setting and seed.
        weights: Weights over its epochs.
        splits: Seeds of the splits.
        item: Name of the experiment.
        method: Name of the method.
        cost: Seconds of all training that the method needs.
    """
    about: dict[str, Any] = {
        "item": item,
        "method": method,
        "networks": weights.networks,
        "seconds": cost,
    }
    halves = {split: record.split(split)[1] for split in splits}
    return [score(fuse(half, weights), half, split=s, **about) for s, half in halves.items()]


def seconds(record: RunRecord) -> float:
    """How long it took to make a record."""
    return float(record.provenance["seconds"])


def _test_halves(records: Sequence[RunRecord], split: int) -> list[RunRecord]:
    return [record.split(split)[1] for record in records]


Protocol = tuple[RunConfig, Fusion]


def snapshot(config: RunConfig, networks: int) -> Protocol:
    """A cyclic rate all the time, and the networks at the ends of its cycles (Huang et al., 2017).

    >>> snapshot(RunConfig(epochs=4), 2)[1].weights.tolist()
    [0.0, 0.5, 0.0, 0.5]
    """
    return _spaced(dataclasses.replace(config, schedule="cyclic", cycles=networks), networks)


def fge(config: RunConfig, networks: int) -> Protocol:
    """A cyclic rate in the last quarter, and the networks there (Garipov et al., 2018).

    >>> fge(RunConfig(epochs=8), 2)[1].weights.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    """
    return _spaced(dataclasses.replace(config, schedule="cyclic_tail", cycles=networks), networks)


def swa(config: RunConfig, networks: int) -> Protocol:
    """A constant rate in the last quarter, for the mean of the weights (Izmailov et al., 2018).

    >>> swa(RunConfig(epochs=8), 2)[1].weights.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    """
    return _spaced(dataclasses.replace(config, schedule="constant_tail"), networks)


def ema(config: RunConfig, decay: float) -> Protocol:
    """The usual schedule; what is recorded is the moving average of the weights over steps.

    >>> ema(RunConfig(epochs=2), 0.99)[1].weights.tolist()
    [0.0, 1.0]
    """
    last = np.zeros(config.epochs)
    last[-1] = 1
    return dataclasses.replace(config, ema=decay, keep_every=config.epochs), Fusion(last)


def compare_protocols(
    configs: Sequence[RunConfig],
    *,
    item: str,
    networks: int = 5,
    decay: float = 0.99,
    splits: Sequence[int] = (0, 1, 2),
    fresh: bool = False,
) -> list[Result]:
    """Score snapshot ensembles, FGE, SWA and EMA in the place of these runs; they select nothing.

    Args:
        configs: One for each setting and seed, as `fmnlib.paper.compare.compare` takes them.
        item: Name of the experiment.
        networks: Networks of a snapshot ensemble, of FGE, and in the mean of SWA.
        decay: Of the moving average, per step.
        splits: Seeds of the splits.
        fresh: Leave the committed records aside and train.
    """
    every_protocol = [_protocols(config, networks, decay) for config in configs]
    protocols = {name: [one[name] for one in every_protocol] for name in _NAMES}
    every = [config for made in protocols.values() for config, _ in made]
    records = iter(runs.obtain(every, fresh=fresh))
    jobs = [runs.averaged(config, "swa", fusion) for config, fusion in protocols["swa"]]
    means = iter(runs.obtain(jobs, fresh=fresh))
    results = []
    for method, made in protocols.items():
        for _, fusion in made:
            record = next(records)
            cost = seconds(record)
            if method == "swa":
                record = next(means)
                fusion, cost = single(record), cost + seconds(record)
            results += score_halves(record, fusion, splits, item=item, method=method, cost=cost)
    return results


def protocol_jobs(
    config: RunConfig, networks: int = 5, decay: float = 0.99
) -> list[tuple[str, Job]]:
    """The jobs, by name, that `compare_protocols` needs for one config."""
    protocols = _protocols(config, networks, decay)
    jobs = [(name, Job(changed)) for name, (changed, _) in protocols.items()]
    return [
        *jobs,
        ("swa, averaged", runs.averaged(protocols["swa"][0], "swa", protocols["swa"][1])),
    ]


_NAMES = ("snapshot", "fge", "swa", "ema")


def _protocols(config: RunConfig, networks: int, decay: float) -> dict[str, Protocol]:
    made = (snapshot(config, networks), fge(config, networks), swa(config, networks))
    return dict(zip(_NAMES, (*made, ema(config, decay)), strict=True))


def _spaced(config: RunConfig, networks: int) -> Protocol:
    """Keep the ends of equal stretches of the tail, or of the whole run; weigh them equally."""
    first, epochs = config.tail_epoch, config.epochs
    whole = first == 0 or first == TAIL * epochs
    if networks < 1 or not whole or (epochs - first) % networks:
        part = f"the last quarter of {epochs}" if first else f"the {epochs}"
        raise InputError(f"networks is {networks}; choose a number that divides {part} epochs")
    length = (epochs - first) // networks
    weights = np.zeros(epochs)
    weights[first + length - 1 :: length] = 1 / networks
    return dataclasses.replace(config, keep_every=length), Fusion(weights)


def student_of_finals(name: str, teachers: Sequence[RunConfig]) -> Job:
    """The job of distilling the final networks of some runs, equally weighted, into one.

    The student has the recipe of the first run.

    >>> student_of_finals("single", [RunConfig()]).members[0].epoch
    39
    """
    share = 1 / len(teachers)
    members = tuple(Member(t, runs.folder(t), t.epochs - 1, share) for t in teachers)
    return Job(student_config(teachers[0], name, members), members)


def compare_students(
    configs: Sequence[RunConfig],
    *,
    item: str,
    splits: Sequence[int] = (0, 1, 2),
    members: int = 3,
    fresh: bool = False,
) -> list[Result]:
    """Score students of the final network and of the independent ensemble; they select nothing.

    Args:
        configs: One for each setting and seed.
        item: Name of the experiment.
        splits: Seeds of the splits.
        members: Size of the independent ensemble, as in `fmnlib.paper.compare.compare`.
        fresh: Leave the committed records aside and train.
    """
    ensembles = [independent_members(config, members) for config in configs]
    teachers = [("single", ensemble[:1]) for ensemble in ensembles]
    teachers += [("independent", ensemble) for ensemble in ensembles]
    made = runs.obtain([student_of_finals(*teacher) for teacher in teachers], fresh=fresh)
    results = []
    for (name, ensemble), student in zip(teachers, made, strict=True):
        cost = sum(map(seconds, [*runs.obtain(ensemble, fresh=fresh), student]))
        method, final = f"student_{name}", single(student)
        results += score_halves(student, final, splits, item=item, method=method, cost=cost)
    return results


def try_losses(
    configs: Sequence[RunConfig],
    losses: Sequence[Mapping[str, Any]],
    *,
    split: int = 0,
    fresh: bool = False,
) -> list[list[float]]:
    """Accuracy of students of Knowledge Fusion on the validation half, for each loss and run.

    It is the validation half because these numbers choose the defaults of `StudentConfig`.

    Args:
        configs: The runs.
        losses: Fields of `StudentConfig`: temperature, soft_share, teacher_views, init.
        split: Seed of the split.
        fresh: Leave the committed records aside and train.

    Returns:
        For each loss a list with the accuracy of each run, from 0 to 1.
    """
    jobs = []
    for config, record in zip(configs, runs.obtain(configs, fresh=fresh), strict=True):
        kf = knowledge_fusion(record.split(split)[0])
        jobs += [runs.student(config, "kf", kf, **loss) for loss in losses]
    students = runs.obtain(jobs, fresh=fresh)
    accuracy = [float(student.split(split)[0].accuracy[-1]) for student in students]
    return [accuracy[number :: len(losses)] for number in range(len(losses))]
