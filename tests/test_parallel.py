"""One run on two processes leaves the record that it leaves on one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fmnlib import RunConfig, RunRecord
from fmnlib.training import train


def flags(config, changed):
    for name in changed:
        yield from (f"--{name.replace('_', '-')}", str(getattr(config, name)))


@pytest.mark.parametrize(
    ("model", "precision", "rounding"),
    [("mlp", "float32", 1e-3), ("mlp", "bfloat16", 2e-2)],
)
def test_two_processes_leave_the_record_of_one(tmp_path, model, precision, rounding):
    chosen = {
        "model": model,
        "precision": precision,
        "epochs": 3,
        "train_samples": 301,
        "eval_samples": 75,
    }
    chosen |= {"batch_size": 50, "lr": 0.02, "ema": 0.8, "augment": "crop"}
    chosen |= {"noise": "symmetric", "noise_rate": 0.2}
    config = RunConfig(**chosen)
    alone = train(config, tmp_path / "alone", device="cpu", progress=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "fmnlib", "train", "--device", "cpu", "--json"]
    place = {"FMN_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags(config, chosen)], env=os.environ | place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == config.id  # the first process alone speaks
    shared = RunRecord.load(tmp_path / config.id)
    np.testing.assert_allclose(shared.probs, alone.probs, atol=2 * rounding)
    assert (shared.predicted == alone.predicted).mean() > 1 - 5 * rounding
    for name in ("train_loss", "train_accuracy", "memorised", "eval_loss", "lr"):
        np.testing.assert_allclose(shared.curves[name], alone.curves[name], rounding, rounding)
    assert (
        np.abs(shared.loss_histogram - alone.loss_histogram).sum() <= 4000 * rounding
    )  # at an edge


def test_a_loss_that_remembers_samples_is_refused_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "fmnlib", "train", "--device", "cpu"]
    chosen = ["--loss", "elr", "--loss-parameters", "7", "0.9", "--model", "mlp"]
    place = {"FMN_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *chosen], env=os.environ | place, capture_output=True, text=True
    )
    assert done.returncode != 0
    message = "loss is 'elr', which remembers samples, on 2 processes; use one process, or gce"
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
