"""The learning rate over a run."""

import math

from fmnlib.config import TAIL, RunConfig

__all__ = ["learning_rate"]


def learning_rate(config: RunConfig, done: float) -> float:
    """The learning rate when a share of the run is done, from 0 to 1.

    >>> [learning_rate(RunConfig(lr=1.0), done) for done in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    warmup = config.warmup / config.epochs
    if done < warmup:
        start = config.warmup_factor
        return config.lr * (start + (1 - start) * done / warmup)
    return _scheduled(config, (done - warmup) / (1 - warmup))


def _scheduled(config: RunConfig, done: float) -> float:
    if config.schedule in ("step", "thirds"):
        first, second = (1 / 2, 3 / 4) if config.schedule == "step" else (1 / 3, 2 / 3)
        return config.lr * 0.1 ** ((done >= first) + (done >= second))
    if config.schedule == "constant":
        return config.lr
    high, low = config.lr, config.lr_min
    if config.schedule == "cyclic":
        done = done * config.cycles % 1
    elif config.schedule.endswith("tail"):
        middle, tail = config.lr / 2, (done - TAIL) / (1 - TAIL)
        if tail < 0:
            low, done = middle, done / TAIL
        elif config.schedule == "constant_tail":
            return middle
        else:
            high, done = middle, tail * config.cycles % 1
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2
