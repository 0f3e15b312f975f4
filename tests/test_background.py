"""What is left to the disk is done aside, in order, one epoch at a time; its errors come back."""

import threading

import pytest
import torch

from fmnlib import RunConfig, recorder
from fmnlib.recorder import Background
from fmnlib.training import train

CPU = torch.device("cpu")


def test_on_a_cpu_a_job_computes_at_once_and_leaves_the_rest_aside():
    where = []

    def job():
        where.append(threading.current_thread())
        return lambda: where.append(threading.current_thread())

    with Background(CPU) as background:
        background.do(job)
        assert where[0] is threading.main_thread()
    assert where[1] is not threading.main_thread()


def test_a_job_begins_after_all_of_the_one_before():
    order, go_on = [], threading.Event()

    def rest():
        go_on.wait()
        order.append("rest of the first")

    with Background(CPU) as background:
        background.do(lambda: rest)
        threading.Timer(0.05, go_on.set).start()
        background.do(lambda: order.append("the second") or (lambda: None))
    assert order == ["rest of the first", "the second"]


def run(*rests, error=None):
    """Jobs that leave these things to the disk; then training fails with an error."""
    with Background(CPU) as background:
        for rest in rests:
            background.do(lambda rest=rest: rest)
        if error is not None:
            raise error


def full():
    raise OSError("no space left")


def test_what_goes_wrong_aside_is_raised_by_the_next_job_and_at_the_end():
    done = []
    with pytest.raises(OSError, match="no space left"):
        run(full, lambda: done.append("the second"))
    assert not done
    with pytest.raises(OSError, match="no space left"):
        run(full)


def test_what_is_being_written_is_written_to_its_end_when_training_fails():
    written, go_on = [], threading.Event()
    threading.Timer(0.05, go_on.set).start()
    with pytest.raises(KeyboardInterrupt):
        run(lambda: go_on.wait() and written.append(1), error=KeyboardInterrupt())
    assert written == [1]


def test_the_disk_holds_the_files_of_an_epoch_in_order(tmp_path, monkeypatch):
    order, hold, put = [], recorder.sync, recorder.write_whole
    monkeypatch.setattr(recorder, "sync", lambda path: (order.append(path.name), hold(path)))

    def write(path, content):
        order.append(path.name)
        put(path, content)

    monkeypatch.setattr(recorder, "write_whole", write)
    train(RunConfig(train_samples=50, epochs=2, keep_every=2), tmp_path, progress=False)
    states = ["state_0.safetensors", "state_1.safetensors"]
    kept = ["probs.npy", "epoch_0001.safetensors"]
    assert [name for name in order if name in (*states, *kept)] == [states[0], *kept, states[1]]


def test_what_cannot_be_written_keeps_what_follows_it_from_the_disk(tmp_path, monkeypatch):
    put = recorder.write_whole

    def write(path, content):
        if path.name == "epoch_0001.safetensors":
            raise OSError("the disk is full")
        put(path, content)

    monkeypatch.setattr(recorder, "write_whole", write)
    with pytest.raises(OSError, match="the disk is full"):
        train(RunConfig(train_samples=50, epochs=3), tmp_path, progress=False)
    assert (tmp_path / "state_0.safetensors").exists()
    assert not (tmp_path / "state_1.safetensors").exists()
