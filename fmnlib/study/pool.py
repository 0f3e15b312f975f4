"""Processes that train runs side by side, one thread each."""

import functools
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import torch

__all__ = ["worker_pool"]


@functools.cache
def worker_pool(workers: int, *_place: str) -> ProcessPoolExecutor:
    """Processes that are there for the next call, too: each takes seconds to load torch.

    They know the data and the working folder that there were when they began.
    """
    # Fresh interpreters: a fork would inherit torch's threads, half alive.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin_worker)


def _begin_worker() -> None:
    """One thread for the arithmetic; end at once with the parent, for runs may be killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)
