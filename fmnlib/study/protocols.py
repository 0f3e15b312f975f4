"""Methods that change the training (AAAI Table 3): each is a config, and weights over epochs.

Each takes the epochs of one run. Snapshot ensembles and FGE average the probabilities of the
networks that have weight, SWA averages their parameters. EMA averages parameters at every step,
so that its run records the average itself.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fmnlib.config import TAIL, InputError, RunConfig
from fmnlib.fusion import Fusion, single
from fmnlib.record import Result
from fmnlib.study import runs
from fmnlib.study.compare import score_halves, seconds
from fmnlib.study.runs import Job

__all__ = ["compare_protocols", "ema", "fge", "protocol_jobs", "snapshot", "swa"]

Protocol = tuple[RunConfig, Fusion]


def snapshot(config: RunConfig, networks: int) -> Protocol:
    """A cyclic rate all the time, and the networks at the ends of its cycles (Huang et al., 2017).

    >>> snapshot(RunConfig(epochs=4), 2)[1].weights.tolist()
    [0.0, 0.5, 0.0, 0.5]
    """
    return _spaced(dataclasses.replace(config, schedule="cyclic", cycles=networks), networks)


def fge(config: RunConfig, networks: int) -> Protocol:
    """A cyclic rate in the last quarter, and the networks there (Garipov et al., 2018).

    >>> fge(RunConfig(epochs=8), 2)[1].weights.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    """
    return _spaced(dataclasses.replace(config, schedule="cyclic_tail", cycles=networks), networks)


def swa(config: RunConfig, networks: int) -> Protocol:
    """A constant rate in the last quarter, for the mean of the weights (Izmailov et al., 2018).

    >>> swa(RunConfig(epochs=8), 2)[1].weights.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    """
    return _spaced(dataclasses.replace(config, schedule="constant_tail"), networks)


def ema(config: RunConfig, decay: float) -> Protocol:
    """The usual schedule; what is recorded is the moving average of the weights over steps.

    >>> ema(RunConfig(epochs=2), 0.99)[1].weights.tolist()
    [0.0, 1.0]
    """
    last = np.zeros(config.epochs)
    last[-1] = 1
    return dataclasses.replace(config, ema=decay, keep_every=config.epochs), Fusion(last)


def compare_protocols(
    configs: Sequence[RunConfig],
    *,
    item: str,
    networks: int = 5,
    decay: float = 0.99,
    splits: Sequence[int] = (0, 1, 2),
    fresh: bool = False,
) -> list[Result]:
    """Score snapshot ensembles, FGE, SWA and EMA in the place of these runs; they select nothing.

    Args:
        configs: One for each setting and seed, as `fmnlib.study.compare.compare` takes them.
        item: Name of the experiment.
        networks: Networks of a snapshot ensemble, of FGE, and in the mean of SWA.
        decay: Of the moving average, per step.
        splits: Seeds of the splits.
        fresh: Leave the committed records aside and train.
    """
    every_protocol = [_protocols(config, networks, decay) for config in configs]
    protocols = {name: [one[name] for one in every_protocol] for name in _NAMES}
    every = [config for made in protocols.values() for config, _ in made]
    records = iter(runs.obtain(every, fresh=fresh))
    jobs = [runs.averaged(config, "swa", fusion) for config, fusion in protocols["swa"]]
    means = iter(runs.obtain(jobs, fresh=fresh))
    results = []
    for method, made in protocols.items():
        for _, fusion in made:
            record = next(records)
            cost = seconds(record)
            if method == "swa":
                record = next(means)
                fusion, cost = single(record), cost + seconds(record)
            results += score_halves(record, fusion, splits, item=item, method=method, cost=cost)
    return results


def protocol_jobs(
    config: RunConfig, networks: int = 5, decay: float = 0.99
) -> list[tuple[str, Job]]:
    """The jobs, by name, that `compare_protocols` needs for one config."""
    protocols = _protocols(config, networks, decay)
    jobs = [(name, Job(changed)) for name, (changed, _) in protocols.items()]
    return [
        *jobs,
        ("swa, averaged", runs.averaged(protocols["swa"][0], "swa", protocols["swa"][1])),
    ]


_NAMES = ("snapshot", "fge", "swa", "ema")


def _protocols(config: RunConfig, networks: int, decay: float) -> dict[str, Protocol]:
    made = (snapshot(config, networks), fge(config, networks), swa(config, networks))
    return dict(zip(_NAMES, (*made, ema(config, decay)), strict=True))


def _spaced(config: RunConfig, networks: int) -> Protocol:
    """Keep the ends of equal stretches of the tail, or of the whole run; weigh them equally."""
    first, epochs = config.tail_epoch, config.epochs
    whole = first == 0 or first == TAIL * epochs
    if networks < 1 or not whole or (epochs - first) % networks:
        part = f"the last quarter of {epochs}" if first else f"the {epochs}"
        raise InputError(f"networks is {networks}; choose a number that divides {part} epochs")
    length = (epochs - first) // networks
    weights = np.zeros(epochs)
    weights[first + length - 1 :: length] = 1 / networks
    return dataclasses.replace(config, keep_every=length), Fusion(weights)
