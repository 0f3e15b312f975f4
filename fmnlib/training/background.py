"""Writing while the next epoch trains: one job at a time, so that memory stays bounded.

On a GPU all of a job is done aside. On a CPU its computing would take cores from the training, and
threads that wait for each other at every step wait long for one that has no core: there a job
computes at once, and only the waiting for the disk goes aside.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

__all__ = ["Background"]


Job = Callable[[], Callable[[], None]]
"""Computes something, and returns what is left to do, which is to wait for the disk."""


class Background:
    """Does jobs in order in one thread; `do` waits for the job before, and raises its error.

    On a GPU a job reads its tensors on a stream of its own, after all that was asked of the device
    before the job was given.

    >>> with Background(torch.device("cpu")) as background:
    ...     background.do(lambda: lambda: print("written"))
    written
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def do(self, job: Job) -> None:
        """Wait for the last job, then start this one."""
        self.wait()
        rest = job() if self._stream is None else self._behind(job, self._stream)
        self._last = self._pool.submit(rest)

    def wait(self) -> None:
        """Wait until everything is done, and raise what went wrong."""
        if self._last is not None:
            self._last.result()

    def _behind(self, job: Job, stream: torch.cuda.Stream) -> Callable[[], None]:
        asked = torch.cuda.Event()
        asked.record()

        def run() -> None:
            with torch.cuda.stream(stream):
                asked.wait(stream)
                job()()

        return run

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown()  # an epoch that is being written is written to its end
