"""Which loss and which start for the student? Measured on the validation half, quick profile.

`python benchmarks/distillation.py` trains 3 runs and 54 students (about three minutes on two
cores), prints the table and writes it to results/distillation.csv, which the book shows. The
test half is not looked at: these numbers choose the defaults of `RunConfig`.
"""

import dataclasses
import itertools
from pathlib import Path

import pandas as pd

from fmnlib import RunConfig, runs
from fmnlib.search import knowledge_fusion
from fmnlib.stats import mean_sem

SEEDS = (0, 1, 2)
CHOICES = list(itertools.product((1.0, 2.0, 4.0), (1.0, 0.9, 0.5), ("scratch", "teacher")))


def main() -> None:
    configs = [RunConfig(noise="symmetric", noise_rate=0.4, seed=seed) for seed in SEEDS]
    jobs = []
    for config, record in zip(configs, runs.obtain(configs, fresh=True), strict=True):
        found = knowledge_fusion(record.split(0)[0])
        for temperature, soft_share, init in CHOICES:
            loss = {"temperature": temperature, "soft_share": soft_share}
            job = runs.student(config, "kf", found, **loss)
            started = dataclasses.replace(job.config, init=init)
            jobs.append(dataclasses.replace(job, config=started))
    students = runs.obtain(jobs, fresh=True)
    rows = []
    for number, (temperature, soft_share, init) in enumerate(CHOICES):
        mine = students[number :: len(CHOICES)]
        mean, sem = mean_sem([100 * student.split(0)[0].accuracy[-1] for student in mine])
        rows.append(
            {
                "temperature": temperature,
                "soft share": soft_share,
                "start": init,
                "validation accuracy (%)": round(mean, 1),
                "standard error": round(sem, 1),
                "seeds": len(mine),
            }
        )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    table.to_csv(Path(__file__).parent.parent / "results" / "distillation.csv", index=False)


if __name__ == "__main__":
    main()
