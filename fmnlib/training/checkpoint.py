"""Tensors on disk: written whole or not at all, checked when read, never unpickled."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fmnlib.config import InputError
from fmnlib.files import write_whole

__all__ = ["checkpoint_path", "load_tensors", "lossless", "pack", "rounded", "save_tensors"]


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Where the weights after an epoch lie."""
    return folder / "checkpoints" / f"epoch_{epoch:04d}.safetensors"


def rounded(model: nn.Module) -> frozenset[str]:
    """The weights that autocast rounds to half precision in every pass, by name.

    Those of linear layers, convolutions and attention; an embedding of positions, say, it leaves.

    >>> sorted(rounded(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))))
    ['0.weight']
    """
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            names.add(f"{name}.weight".lstrip("."))
        if isinstance(module, nn.MultiheadAttention):
            names.add(f"{name}.in_proj_weight".lstrip("."))
    return frozenset(names)


def lossless(state: Mapping[str, Tensor], halved: Collection[str]) -> dict[str, Tensor]:
    """Weights as small as they can be kept without changing what the network predicts.

    Args:
        state: The weights.
        halved: Those that are rounded in every pass anyway, as `rounded` names them.
    """
    return {k: v.bfloat16() if k in halved else v for k, v in state.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a small JSON-able note to one safetensors file with a checksum."""
    write_whole(path, pack(tensors, about))


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """What `save_tensors` writes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    note = {"about": json.dumps(about), "sha256": _checksum(plain)}
    return safetensors.torch.save(plain, note)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what `save_tensors` wrote.

    Raises:
        InputError: If the file is missing, truncated, foreign, or its checksum is not right.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if note["sha256"] != _checksum(tensors):
            raise ValueError("its checksum is wrong")
        return tensors, json.loads(note["about"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({reason}); move it away, run again") from error


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
