"""What a run needs to go on after it was killed: written after every epoch, the last two kept."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fmnlib.config import InputError
from fmnlib.files import Batch
from fmnlib.training.checkpoint import load_tensors, pack
from fmnlib.training.step import Parts

__all__ = ["clear", "newest", "restore", "snapshot", "write_state"]


def snapshot(parts: Parts) -> dict[str, Tensor]:
    """Copies of everything that training changes, by name, on the device that they are on."""
    tensors = {f"model.{name}": value for name, value in parts.model.state_dict().items()}
    if parts.ema is not parts.model:
        tensors |= {f"ema.{name}": value for name, value in parts.ema.state_dict().items()}
    for number, state in parts.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return {name: value.clone() for name, value in tensors.items()}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def restore(parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `snapshot` gave."""
    parts.model.load_state_dict(under(tensors, "model."))
    if parts.ema is not parts.model:
        parts.ema.load_state_dict(under(tensors, "ema."))
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in under(tensors, "optimizer.").items():
        number, _, key = name.partition(".")
        like = parameters[int(number)]
        if value.shape == like.shape:  # a file has rows in order; fused updates want like strides
            value = torch.empty_like(like, dtype=value.dtype, device="cpu").copy_(value)
        state.setdefault(int(number), {})[key] = value
    parts.optimizer.load_state_dict(parts.optimizer.state_dict() | {"state": state})


def write_state(folder: Path, tensors: Mapping[str, Tensor], epoch: int, files: Batch) -> None:
    """Write the state after an epoch; the epoch is complete once the file is in its place.

    It replaces the state of the epoch before the last, so that one damaged file costs one epoch.
    """
    files.write(_file(folder, epoch), pack({**tensors, "epoch": torch.tensor(epoch)}, {}))


def newest(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """The last complete epoch whose state can be read, and the state; None where there is none.

    A damaged file is named in a warning and set aside.
    """
    found: list[tuple[int, dict[str, Tensor]]] = []
    for file in (_file(folder, 0), _file(folder, 1)):
        if not file.exists():
            continue
        try:
            tensors, _ = load_tensors(file)
            if "epoch" not in tensors:
                raise InputError(f"{file} names no epoch")
            found.append((int(tensors.pop("epoch")), tensors))
        except InputError as error:
            aside = file.with_suffix(".damaged")
            file.replace(aside)
            warnings.warn(f"{error}; set aside as {aside.name}", stacklevel=2)
    return max(found, key=lambda state: state[0], default=None)


def clear(folder: Path) -> None:
    """Remove the states of a run that is complete."""
    for epoch in (0, 1):
        with contextlib.suppress(FileNotFoundError):
            _file(folder, epoch).unlink()


def _file(folder: Path, epoch: int) -> Path:
    return folder / f"state_{epoch % 2}.safetensors"
