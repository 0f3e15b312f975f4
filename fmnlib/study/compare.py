"""The methods of the papers' tables, side by side on the same runs and the same halves."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fmnlib import fusion as ensembles
from fmnlib.config import InputError, RunConfig
from fmnlib.fusion import Fusion, fuse
from fmnlib.record import Result, RunRecord
from fmnlib.search import knowledge_fusion
from fmnlib.stats import score
from fmnlib.study import runs
from fmnlib.study.runs import Job

__all__ = ["compare", "independent_members", "one_run_fusions", "score_halves", "seconds"]


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One run on one split, and what was chosen on its validation half."""

    item: str
    config: RunConfig
    split: int
    crowd: Sequence[RunRecord]
    fusions: Mapping[str, Fusion]

    def jobs(self) -> list[Job]:
        """The networks that have to be made from the fusion."""
        kf = self.fusions["kf"]
        return [runs.averaged(self.config, "kf", kf), runs.student(self.config, "kf", kf)]


def compare(
    configs: Sequence[RunConfig],
    *,
    item: str,
    splits: Sequence[int] = (0, 1, 2),
    members: int = 3,
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
        fresh: Leave the committed records aside and train.
    """
    crowds = [independent_members(config, members) for config in configs]
    records = runs.obtain([config for crowd in crowds for config in crowd], fresh=fresh)
    cells = []
    for number, config in enumerate(configs):
        crowd = records[number * members : (number + 1) * members]
        for split in splits:
            val, _ = crowd[0].split(split)
            cells.append(_Cell(item, config, split, crowd, one_run_fusions(val)))
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
        "single": ensembles.single(val),
        "early_stopping": ensembles.early_stopping(val),
        "horizontal": ensembles.horizontal(val, kf.networks),
        "fixed_jumps": ensembles.fixed_jumps(val, kf.networks),
        "kf_one": knowledge_fusion(val, max_picks=1),
        "kf": kf,
    }


def _score(cell: _Cell, averaged: RunRecord, student: RunRecord) -> list[Result]:
    """Every method on the test half, with the networks and the training time that it takes."""
    test = cell.crowd[0].split(cell.split)[1]
    once = seconds(cell.crowd[0])
    made = {
        method: (fuse(test, fusion), fusion.networks, once)
        for method, fusion in cell.fusions.items()
    }
    finals = [fuse(half, ensembles.single(half)) for half in _test_halves(cell.crowd, cell.split)]
    crowd_seconds = sum(map(seconds, cell.crowd))
    made["independent"] = (np.mean(finals, axis=0), len(finals), crowd_seconds)
    for method, record in (("averaged_kf", averaged), ("distilled_kf", student)):
        half = record.split(cell.split)[1]
        probs = fuse(half, ensembles.single(half))
        made[method] = (probs, 1, once + seconds(record))
    return [
        score(
            probs,
            test.labels,
            item=cell.item,
            setting=cell.config.setting,
            method=method,
            seed=cell.config.seed,
            split_seed=cell.split,
            networks=networks,
            train_seconds=round(cost, 2),
        )
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
    if record.config is None:
        raise InputError("this record has no config; give the record of a trained run")
    halves = {split: record.split(split)[1] for split in splits}
    return [
        score(
            fuse(half, weights),
            half.labels,
            item=item,
            setting=record.config.setting,
            method=method,
            seed=record.config.seed,
            split_seed=split,
            networks=weights.networks,
            train_seconds=round(cost, 2),
        )
        for split, half in halves.items()
    ]


def seconds(record: RunRecord) -> float:
    """How long it took to make a record."""
    return float(record.provenance["seconds"])


def _test_halves(records: Sequence[RunRecord], split: int) -> list[RunRecord]:
    return [record.split(split)[1] for record in records]
