"""The methods of the papers' tables, side by side on the same runs and the same halves.

All take a config for each setting and seed, the name of the experiment (`item`, such as
label_noise) and the seeds of the splits, as in `fmnlib.paper.ablation.scored`: what is chosen is
chosen on the validation half, and scores are of the test half. `fresh` ignores the committed
records and trains.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fmnlib import fusion, runs
from fmnlib.config import TAIL, InputError, RunConfig
from fmnlib.data import load
from fmnlib.distillation import Member, student_config
from fmnlib.fusion import Fusion, Search, fuse, knowledge_fusion, single
from fmnlib.paper.ablation import always, scored
from fmnlib.record import Result, RunRecord
from fmnlib.runs import Job
from fmnlib.stats import score

REGIMES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {"augmented": {"augment": "crop", "epochs": 60, "keep_every": 2}, "memorising": {}},
    "standard": {"augmented": {"augment": "crop_flip", "epochs": 60}, "memorising": {}},
    "paper": {"augmented": {}, "memorising": {"augment": "none"}},
}
"""What the two regimes change in each profile; memorising is classic overfitting."""
NEIGHBOURS = 15

Configs = Sequence[RunConfig]  # one for each setting and seed
Seeds = Sequence[int]  # of trainings or of splits
_Part = tuple[Job, Mapping[str, Search], Seeds]  # with ways to choose, and splits


def replicates(
    profile: str,
    settings: Sequence[tuple[str, float]],
    seeds: Seeds,
    regimes: Sequence[str] = ("augmented", "memorising"),
    **changes: Any,
) -> list[RunConfig]:
    """Runs of every regime, noise and seed; each seed has its own draw of the wrong labels.

    Profiles are those of `RunConfig.of_profile`, settings are kinds of noise with their rates, and
    changes other fields of `RunConfig`.

    >>> [run.condition for run in replicates("quick", [("symmetric", 0.4)], [0])]
    ['augmented_sym40', 'memorising_sym40']
    """
    return [
        RunConfig.of_profile(
            profile,
            **REGIMES[profile][regime]
            | {"noise": noise, "noise_rate": rate, "seed": seed, "noise_seed": seed}
            | changes,
        )
        for regime in regimes
        for noise, rate in settings
        for seed in seeds
    ]


def compare(
    configs: Configs,
    *,
    item: str,
    splits: Seeds = (),
    members: int = 3,
    teacher_views: int = 0,
    fresh: bool = False,
) -> list[Result]:
    """Score single networks, ensembles, students and 15 nearest neighbours on these runs.

    The ensembles over epochs have as many networks as Knowledge Fusion took, the independent one
    has `members`; the nearest neighbours are of pixels, with the labels that the run trains on.
    Students of runs with augmentation have `teacher_views`, as in `StudentConfig`.
    """
    ensembles = [independent_members(config, members) for config in configs]
    records = iter(runs.obtain(itertools.chain(*ensembles), fresh=fresh))
    results: list[Result] = []
    parts: list[_Part] = []
    for config in configs:
        ensemble = [*itertools.islice(records, members)]
        run = ensemble[0]
        for split in splits or [config.seed]:
            fusions = _fuse_run(run.split(split)[0])
            ways = {method: always(weights) for method, weights in fusions.items()}
            results += scored([run], [split], ways, item=item)
            results += [_score_neighbours(run, split, item)]
            results += [_score_independent(ensemble, split, item)]
            jobs = merged_jobs(config, fusions["best_probs"], fusions["kf"], teacher_views)
            parts += [(job, {method: single}, [split]) for method, job in jobs.items()]
    return results + _score_jobs(parts, item, fresh)


def merged_jobs(config: RunConfig, best: Fusion, kf: Fusion, teacher_views: int) -> dict[str, Job]:
    """The jobs of putting the best epochs and Knowledge Fusion into one network, by method."""
    views = 0 if config.augment == "none" else teacher_views
    return {
        "averaged_best": runs.averaged(config, "best", best),
        "averaged_kf": runs.averaged(config, "kf", kf),
        "distilled_kf": runs.student(config, "kf", kf, teacher_views=views),
    }


def _score_jobs(parts: Sequence[_Part], item: str, fresh: bool) -> list[Result]:
    """Run jobs and score their records; the training time of their teachers counts as well."""
    records = runs.obtain([job for job, _, _ in parts], fresh=fresh)
    teachers = [[*dict.fromkeys(m.config for m in job.members)] for job, _, _ in parts]
    every = [*dict.fromkeys(itertools.chain(*teachers))]
    seconds = dict(zip(every, map(_seconds, runs.obtain(every, fresh=fresh)), strict=True))
    results = []
    for (_, ways, splits), record, configs in zip(parts, records, teachers, strict=True):
        cost = sum((seconds[config] for config in configs), 0.0)
        results += scored([record], splits, ways, item=item, extra_seconds=cost)
    return results


def independent_members(config: RunConfig, members: int) -> list[RunConfig]:
    """The config, and copies with other training seeds on the same noisy labels.

    Seeds are a thousand apart, so that the ensembles of neighbouring seeds share no network. The
    copies keep only the final network.
    """
    seeds = [config.seed + 1000 * number for number in range(1, members)]
    final = config.keeping(config.epochs)
    return [config, *(dataclasses.replace(final, seed=seed) for seed in seeds)]


def _fuse_run(val: RunRecord) -> dict[str, Fusion]:
    """The methods that need one run alone, chosen on its validation half."""
    kf = knowledge_fusion(val)
    return {
        "single": single(val),
        "early_stopping": fusion.early_stopping(val),
        "window": fusion.early_stopping_window(val, kf.networks),
        "best_probs": fusion.best_epochs(val),
        "uniform": fusion.uniform(val),
        "horizontal": fusion.horizontal(val, kf.networks),
        "fixed_jumps": fusion.fixed_jumps(val, kf.networks),
        "kf_one": knowledge_fusion(val, max_picks=1),
        "kf": kf,
    }


def _score_neighbours(run: RunRecord, split: int, item: str) -> Result:
    from sklearn.neighbors import KNeighborsClassifier

    assert run.config is not None
    data, test = load(run.config), run.split(split)[1]
    assert isinstance(data.images, Tensor)
    assert isinstance(data.eval_images, Tensor)
    pixels, queries = (
        data.normalize(images).flatten(1).numpy() for images in (data.images, data.eval_images)
    )
    knn = KNeighborsClassifier(NEIGHBOURS).fit(pixels, data.labels.numpy())
    probs = np.zeros((len(test.labels), run.classes))
    probs[:, knn.classes_] = knn.predict_proba(queries[test.index])
    return score(probs, test, item=item, method="knn", split=split, networks=0, seconds=0.0)


def _score_independent(ensemble: Sequence[RunRecord], split: int, item: str) -> Result:
    tests = [record.split(split)[1] for record in ensemble]
    probs = np.mean([fuse(test, single(test)) for test in tests], axis=0)
    cost: dict[str, Any] = {"networks": len(tests), "seconds": sum(map(_seconds, ensemble))}
    return score(probs, tests[0], item=item, method="independent", split=split, **cost)


def _seconds(record: RunRecord) -> float:
    return float(record.provenance["seconds"])


def compare_baselines(
    configs: Configs, *, item: str, decay: float = 0.99, splits: Seeds = (), fresh: bool = False
) -> list[Result]:
    """Score three other uses of a run's budget and of the validation half's clean labels.

    A moving average of the weights, of this decay a step, with early stopping (among ten of its
    epochs, and the last); a network that trains on the validation half alone, which the others
    use to choose; and one that trains on it and the run's own data together.
    """
    parts: list[_Part] = []
    for config in configs:
        tenth = max(1, config.epochs // 10)
        moving = config.keeping(tenth, ema=decay)
        parts.append((Job(moving), {"ema_stopped": fusion.early_stopping}, splits))
        last = config.keeping(config.epochs)
        for split in splits or [config.seed]:
            for use, method in (("alone", "clean_half"), ("added", "clean_half_added")):
                trained = dataclasses.replace(last, validation_half=f"{use}:{split}")
                parts.append((Job(trained), {method: single}, [split]))
    return _score_jobs(parts, item, fresh)


def training_methods(
    config: RunConfig, networks: int = 5, decay: float = 0.99
) -> dict[str, tuple[RunConfig, Fusion]]:
    """Other ways to train a run, and weights over their epochs, by name (AAAI Table 3).

    snapshot (Huang et al., 2017): a cyclic rate, the networks at the ends of its cycles. fge
    (Garipov et al., 2018): the same in the last quarter. swa (Izmailov et al., 2018): a constant
    rate in the last quarter, for the mean of the weights of so many networks. ema: the moving
    average of the weights is recorded, with this decay per step.

    >>> of_eight = training_methods(RunConfig(epochs=8), 2)
    >>> {name: np.flatnonzero(fusion.weights).tolist() for name, (_, fusion) in of_eight.items()}
    {'snapshot': [3, 7], 'fge': [6, 7], 'swa': [6, 7], 'ema': [7]}
    """
    if config.warmup:
        raise InputError(f"warmup is {config.warmup}; make it 0, so that cycles are whole epochs")
    schedules: Any = {"snapshot": "cyclic", "fge": "cyclic_tail", "swa": "constant_tail"}
    methods = {}
    for name, schedule in schedules.items():
        cycles = config.cycles if name == "swa" else max(1, networks)
        changed = config.keeping(1, schedule=schedule, cycles=cycles)
        first, epochs = changed.tail_epoch, config.epochs
        exact = first == 0 or first == TAIL * epochs
        if networks < 1 or not exact or (epochs - first) % networks:
            part = f"the last quarter of {epochs}" if first else f"the {epochs}"
            raise InputError(f"networks is {networks}; choose a number that divides {part} epochs")
        length = (epochs - first) // networks
        weights = np.zeros(epochs)
        weights[first + length - 1 :: length] = 1 / networks
        methods[name] = changed.keeping(length), Fusion(weights)
    last = Fusion(np.eye(config.epochs)[-1])
    averaging = config.keeping(config.epochs, ema=decay)
    return methods | {"ema": (averaging, last)}


def compare_protocols(
    configs: Configs,
    *,
    item: str,
    networks: int = 5,
    decay: float = 0.99,
    splits: Seeds = (),
    fresh: bool = False,
) -> list[Result]:
    """Score snapshot ensembles, FGE, SWA and EMA in place of these runs; they select nothing.

    `networks` and `decay` are as in `training_methods`.
    """
    parts: list[_Part] = []
    for config in configs:
        for method, (changed, weights) in training_methods(config, networks, decay).items():
            mean, way = method == "swa", always(weights)
            job = runs.averaged(changed, method, weights) if mean else Job(changed)
            parts.append((job, {method: single if mean else way}, splits))
    return _score_jobs(parts, item, fresh)


def protocol_jobs(config: RunConfig) -> list[tuple[str, Job]]:
    """The jobs, by name, that `compare_protocols` needs for one config."""
    methods = training_methods(config)
    jobs = [(name, Job(changed)) for name, (changed, _) in methods.items()]
    return [*jobs, ("swa, averaged", runs.averaged(methods["swa"][0], "swa", methods["swa"][1]))]


def student_of_finals(name: str, teachers: Sequence[RunConfig], teacher_views: int = 0) -> Job:
    """The job of distilling the final networks of some runs, equally weighted, into one.

    The student has the recipe of the first run.

    >>> student_of_finals("single", [RunConfig()]).members[0].epoch
    39
    """
    weight = 1 / len(teachers)
    members = tuple(Member(t, runs.folder(t), t.epochs - 1, weight) for t in teachers)
    views = 0 if teachers[0].augment == "none" else teacher_views
    return Job(student_config(teachers[0], name, members, teacher_views=views), members)


def compare_students(
    configs: Configs,
    *,
    item: str,
    splits: Seeds = (),
    members: int = 3,
    teacher_views: int = 0,
    fresh: bool = False,
) -> list[Result]:
    """Score students of the final network and of the independent ensemble; they select nothing.

    `members` and `teacher_views` are as in `compare`.
    """
    ensembles = [independent_members(config, members) for config in configs]
    teachers = [("single", ensemble[:1]) for ensemble in ensembles]
    teachers += [("independent", ensemble) for ensemble in ensembles]
    parts: list[_Part] = [
        (student_of_finals(name, ensemble, teacher_views), {f"student_{name}": single}, splits)
        for name, ensemble in teachers
    ]
    return _score_jobs(parts, item, fresh)


def try_losses(
    configs: Configs, losses: Sequence[Mapping[str, Any]], *, split: int = 0, fresh: bool = False
) -> list[list[float]]:
    """Accuracy of students of Knowledge Fusion on the validation half, for each loss and run.

    It is the validation half because these numbers choose the defaults of `StudentConfig`, whose
    fields the losses are: temperature, soft_share, teacher_views, init.
    """
    jobs = []
    for config, record in zip(configs, runs.obtain(configs, fresh=fresh), strict=True):
        kf = knowledge_fusion(record.split(split)[0])
        jobs += [runs.student(config, "kf", kf, **loss) for loss in losses]
    students = runs.obtain(jobs, fresh=fresh)
    accuracy = [float(student.split(split)[0].accuracy[-1]) for student in students]
    return [accuracy[number :: len(losses)] for number in range(len(losses))]
