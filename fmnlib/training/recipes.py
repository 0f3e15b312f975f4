"""Published recipes for large images, read from JSON and scaled to the batch that fits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fmnlib.config import InputError, RunConfig

__all__ = ["read", "scaled"]


def read(path: Path, **changes: Any) -> RunConfig:
    """A recipe, with some fields changed; another batch size scales what hangs on it.

    Args:
        path: A JSON file of the fields of `RunConfig`, such as one in recipes/.
        changes: Fields to change. With `batch_size` go the values that `scaled` finds, unless they
            are given too.

    Raises:
        InputError: If the file is no recipe, or a field is unknown or out of range.

    >>> read(Path("recipes/resnet50.json"), batch_size=64).lr  # 0.1 for 256
    0.025
    """
    try:
        fields = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no recipe ({error}); give JSON of a run's fields") from error
    config = RunConfig.from_dict(fields)
    config = scaled(config, changes.get("batch_size", config.batch_size))
    return RunConfig.from_dict(dataclasses.asdict(config) | changes)


def scaled(config: RunConfig, batch_size: int) -> RunConfig:
    """The same training at another batch size.

    The learning rate is proportional to the batch (Goyal et al., 2017; DeiT does so for AdamW).
    The moving average of weights forgets by samples seen, not by steps: its decay is raised to
    the ratio of the batches.

    Args:
        config: What to scale.
        batch_size: Images a step, over all devices.

    >>> config = scaled(RunConfig(batch_size=256, lr=0.1, ema=0.99), 512)
    >>> config.lr, round(config.ema, 4)
    (0.2, 0.9801)
    """
    ratio = batch_size / config.batch_size
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        lr=config.lr * ratio,
        lr_min=config.lr_min * ratio,
        ema=config.ema**ratio if config.ema else 0.0,
    )
