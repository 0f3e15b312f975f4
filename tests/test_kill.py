"""Nothing written is lost: runs that are killed, damaged, out of time or of disk go on."""

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch

from fmnlib import InputError, RunConfig, RunRecord
from fmnlib.checkpoint import load_tensors, newest_state, restore
from fmnlib.config import Paused
from fmnlib.data import load
from fmnlib.losses import new_memory
from fmnlib.step import TrainingState, make_optimizer, make_scaler
from fmnlib.training import build_model, train

# Dropout, averaged weights, momentum, shifts, what a loss remembers: all a restart has to find.
CONFIG = RunConfig(
    noise="symmetric",
    noise_rate=0.2,
    train_samples=150,
    eval_samples=50,
    augment="crop_flip",
    ema=0.9,
    loss="elr",
    epochs=8,
)
# A server that has loaded torch and computed nothing: its children are real processes, at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fmnlib.training"])


def begin(config, folder, limit=None):
    """A process of its own that trains a run, and can write no file larger than `limit` bytes."""
    process = CONTEXT.Process(
        target=train, args=(config, folder), kwargs={"device": "cpu", "progress": False}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # the number of threads changes rounding
        process.start()
    if limit is not None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folders of runs that nobody stopped, by `keep_best`, and how long each took."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    begin(CONFIG, folder / "warm-up").join()
    for keep in (0, 3):
        started = time.monotonic()
        process = begin(dataclasses.replace(CONFIG, keep_best=keep), folder / f"keep{keep}")
        process.join()
        assert process.exitcode == 0
        found[keep] = folder / f"keep{keep}", time.monotonic() - started
    return found


def assert_same(one, other):
    """Record and weights, bit for bit."""
    a, b = RunRecord.load(one), RunRecord.load(other)
    for name in ("predicted", "probs", "loss_histogram", "kept", "labels"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in set(a.curves) - {"seconds"}:
        np.testing.assert_array_equal(a.curves[name], b.curves[name])
    files = sorted(path.name for path in (one / "checkpoints").iterdir())
    assert files == sorted(path.name for path in (other / "checkpoints").iterdir())
    for file in files:
        weights = [load_tensors(folder / "checkpoints" / file) for folder in (one, other)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(p.name for p in other.iterdir()) == sorted(p.name for p in one.iterdir())


def wait_for_a_file_half_written(process, folder, which):
    """Wait until the process is seen to write its `which`-th file, or has ended."""
    seen = set()
    while len(seen) <= which and process.is_alive():
        for place in (folder, folder / "checkpoints"):
            with contextlib.suppress(FileNotFoundError):
                seen |= {(e.name, e.inode()) for e in os.scandir(place) if e.name[-5:] == ".part"}


@pytest.mark.parametrize("number", range(20))
def test_a_run_that_is_killed_goes_on_with_the_same_bits(whole, tmp_path, number):
    config = dataclasses.replace(CONFIG, keep_best=(0, 3)[number // 2 % 2])
    reference, seconds = whole[config.keep_best]
    rng = np.random.default_rng(number)
    for which in (int(rng.integers(1, 14)), 3, 1, 0):  # a busy machine does not see every file
        folder = tmp_path / f"run{which}"
        process = begin(config, folder)
        if number % 2:
            time.sleep(rng.uniform(0, seconds))
        else:
            wait_for_a_file_half_written(process, folder, which)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL or number % 2:
            break
    assert process.exitcode == -signal.SIGKILL or number % 2, "it ended before it was killed"
    again = begin(config, folder)
    again.join()
    assert again.exitcode == 0
    assert_same(reference, folder)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_state_is_set_aside_and_costs_one_epoch(tmp_path, damage):
    with pytest.raises(Paused):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False, deadline=0.0)
    with pytest.raises(Paused, match=r"paused after 2 of 8 epochs; the same command resumes it"):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False, deadline=0.0)
    newest = tmp_path / "run" / "state_1.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": bytes(content[:99]), "flipped": bytes(content), "empty": b""}[damage]
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"state_1.*; set aside as state_1.damaged"):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    assert (tmp_path / "run" / "state_1.damaged").read_bytes() == damaged
    (tmp_path / "run" / "state_1.damaged").unlink()
    train(CONFIG, tmp_path / "whole", device="cpu", progress=False)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_is_told_and_what_was_written_stays(whole, tmp_path):
    reference, _ = whole[0]
    largest = max(path.stat().st_size for path in reference.rglob("*"))
    process = begin(CONFIG, tmp_path / "run", limit=largest + 1)  # its states are larger
    process.join()
    assert process.exitcode == 1
    assert not list((tmp_path / "run").rglob(".*.part"))
    again = begin(CONFIG, tmp_path / "run")
    again.join()
    assert_same(reference, tmp_path / "run")


def test_a_run_with_time_left_is_not_paused(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2)
    late = time.monotonic() + 3600
    record = train(config, tmp_path, device="cpu", progress=False, deadline=late)
    assert record.epochs == 2


def test_a_changed_row_of_probabilities_is_found(tmp_path):
    train(dataclasses.replace(CONFIG, epochs=2), tmp_path, device="cpu", progress=False)
    content = bytearray((tmp_path / "probs.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "probs.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"probs.npy is not what the record says"):
        RunRecord.load(tmp_path)


def test_a_changed_row_is_found_before_a_run_goes_on(tmp_path):
    with pytest.raises(Paused):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False, deadline=0.0)
    content = bytearray((tmp_path / "run" / "probs.npy").read_bytes())
    content[200] ^= 1
    (tmp_path / "run" / "probs.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"is not what was written; move run away"):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    (tmp_path / "run" / "probs.npy").write_bytes(content[:300])
    with pytest.raises(InputError, match=r"cannot be read .*; move run away and run again"):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)


def test_what_an_optimiser_remembers_has_the_strides_of_its_parameters(tmp_path):
    """Fused updates on a GPU refuse others."""
    with pytest.raises(Paused):
        train(CONFIG, tmp_path, device="cpu", progress=False, deadline=0.0)
    found = newest_state(tmp_path)
    assert found is not None
    assert found[0] == 0
    model = build_model(CONFIG, load(CONFIG))
    scaler = make_scaler(CONFIG, torch.device("cpu"))
    memory = new_memory(CONFIG, load(CONFIG).labels, 10)
    parts = TrainingState(
        model, make_optimizer(CONFIG, model), copy.deepcopy(model), scaler, memory
    )
    restore(parts, found[1])
    for parameter, state in parts.optimizer.state.items():
        assert state["momentum_buffer"].stride() == parameter.stride()
        assert state["momentum_buffer"].abs().sum() > 0
    assert (memory.targets.sum(1) > 0.2).all()  # each sample's target has moved
