"""What is left to the disk is done aside, in order, one epoch at a time; its errors come back."""

import threading

import pytest
import torch

from fmnlib.recorder import Background

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
