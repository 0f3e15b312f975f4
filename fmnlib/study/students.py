"""Students of other teachers than Knowledge Fusion, and of other losses: what makes it work?"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fmnlib.config import RunConfig
from fmnlib.fusion import single
from fmnlib.record import Result
from fmnlib.search import knowledge_fusion
from fmnlib.study import runs
from fmnlib.study.compare import independent_members, score_halves, seconds
from fmnlib.study.runs import Job
from fmnlib.training.distill import Member, student_config

__all__ = ["compare_students", "student_of_finals", "try_losses"]


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
        members: Size of the independent ensemble, as in `fmnlib.study.compare.compare`.
        fresh: Leave the committed records aside and train.
    """
    crowds = [independent_members(config, members) for config in configs]
    teachers = [("single", crowd[:1]) for crowd in crowds]
    teachers += [("independent", crowd) for crowd in crowds]
    made = runs.obtain([student_of_finals(*teacher) for teacher in teachers], fresh=fresh)
    results = []
    for (name, crowd), student in zip(teachers, made, strict=True):
        cost = sum(map(seconds, [*runs.obtain(crowd, fresh=fresh), student]))
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

    It is the validation half because these numbers choose the defaults of `RunConfig`.

    Args:
        configs: The runs.
        losses: Changes of a student's config: temperature, soft_share, init.
        split: Seed of the split.
        fresh: Leave the committed records aside and train.

    Returns:
        For each loss a list with the accuracy of each run, from 0 to 1.
    """
    jobs = []
    for config, record in zip(configs, runs.obtain(configs, fresh=fresh), strict=True):
        job = runs.student(config, "kf", knowledge_fusion(record.split(split)[0]))
        jobs += [
            dataclasses.replace(job, config=dataclasses.replace(job.config, **loss))
            for loss in losses
        ]
    students = runs.obtain(jobs, fresh=fresh)
    accuracy = [float(student.split(split)[0].accuracy[-1]) for student in students]
    return [accuracy[number :: len(losses)] for number in range(len(losses))]
