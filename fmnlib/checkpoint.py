"""A run's files: checkpoints, the state to resume from, and the lock of its folder.

Files of tensors are written atomically, verified when read, and never unpickled. A run that was
killed resumes from the state after its last epoch; the last two states are kept. A folder belongs
to one run, and one process uses it at a time.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor, nn

from fmnlib.config import InputError, RunConfig
from fmnlib.files import require_file, write_whole
from fmnlib.models import State
from fmnlib.parallel import SINGLE_PROCESS, World
from fmnlib.step import TrainingState


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """The file of the weights after an epoch."""
    return folder / "checkpoints" / f"epoch_{epoch:04d}.safetensors"


def rounded_by_autocast(model: nn.Module) -> frozenset[str]:
    """The weights that autocast rounds to half precision in every pass, by name.

    >>> sorted(rounded_by_autocast(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))))
    ['0.weight']
    """
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            names.add(f"{name}.weight".lstrip("."))
        if isinstance(module, nn.MultiheadAttention):
            names.add(f"{name}.in_proj_weight".lstrip("."))
    return frozenset(names)


def rounded(state: State, names: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights, with those in `names` converted to the number format of a run.

    Autocast rounds these in every pass anyway (`rounded_by_autocast`): predictions stay the same.
    """
    return {k: v.to(dtype) if k in names else v for k, v in state.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one safetensors file with a checksum."""
    write_whole(path, pack(tensors))


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """What `save_tensors` writes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"sha256": _checksum(plain)})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors that `save_tensors` wrote; an `InputError` if the file is damaged."""
    try:
        require_file(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata["sha256"] != _checksum(tensors):
            raise ValueError("its checksum is wrong")
        return tensors
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({reason}); move it away, run again") from error


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def snapshot(parts: TrainingState) -> dict[str, Tensor]:
    """Copies of everything that training changes, by name, on the device that they are on."""
    return {name: value.clone() for name, value in parts.tensors().items()}


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, which is removed from the names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def restore(parts: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `snapshot` copied."""
    parts.model.load_state_dict(strip_prefix(tensors, "model."))
    if parts.ema is not parts.model:
        parts.ema.load_state_dict(strip_prefix(tensors, "ema."))
    for name, value in strip_prefix(parts.tensors(), "hidden.").items():
        value.copy_(tensors.get(f"hidden.{name}", value))
    if parts.memory is not None:
        parts.memory.targets.copy_(tensors["loss.targets"])
    for name, value in strip_prefix(parts.tensors(), "scaler.").items():
        value.copy_(tensors.get(f"scaler.{name}", value))
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in strip_prefix(tensors, "optimizer.").items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:  # fused updates need the parameter's strides
            value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
        state.setdefault(int(number), {})[key] = value
    parts.optimizer.load_state_dict(parts.optimizer.state_dict() | {"state": state})


def pack_state(folder: Path, tensors: Mapping[str, Tensor], epoch: int) -> tuple[Path, bytes]:
    """Path and content of the state file after an epoch; writing it completes the epoch.

    It replaces the state of two epochs before, so that a damaged file costs only one epoch.
    """
    return _file(folder, epoch), pack({**tensors, "epoch": torch.tensor(epoch)})


def newest_state(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """The last complete epoch whose state can be read, and the state; None where there is none.

    A damaged file is named in a warning and set aside.
    """
    states: list[tuple[int, dict[str, Tensor]]] = []
    for file in (_file(folder, 0), _file(folder, 1)):
        if not file.exists():
            continue
        try:
            tensors = load_tensors(file)
            if "epoch" not in tensors:
                raise InputError(f"{file} names no epoch")
            states.append((int(tensors.pop("epoch")), tensors))
        except InputError as error:
            aside = file.with_suffix(".damaged")
            file.replace(aside)
            warnings.warn(f"{error}; set aside as {aside.name}", stacklevel=2)
    return max(states, key=lambda state: state[0], default=None)


def clear_states(folder: Path) -> None:
    """Remove the states of a run that is complete."""
    for epoch in (0, 1):
        _file(folder, epoch).unlink(missing_ok=True)


def _file(folder: Path, epoch: int) -> Path:
    return folder / f"state_{epoch % 2}.safetensors"


def folder_lock(folder: Path) -> BaseFileLock:
    """The lock of a run's folder; it is reentrant: its holder can acquire it again."""
    return FileLock(folder / ".lock", is_singleton=True)


@contextmanager
def run_lock(config: RunConfig, folder: Path, world: World = SINGLE_PROCESS) -> Iterator[None]:
    """Lock a run's folder for the processes of `world`; create it if it does not exist.

    If another process holds the lock, print a message and wait. An `InputError` if the folder
    belongs to another run.
    """
    if not world.first:
        world.barrier()
        yield
        return
    lock = folder_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that trains {config.id}", file=sys.stderr)
        lock.acquire()
    try:
        file = folder / "config.json"
        if not file.exists():
            write_whole(file, json.dumps(config.changes(), indent=1).encode())
        elif RunConfig.load(file) != config:
            raise InputError(f"{folder} is the folder of another run; choose another folder")
        for leftover in folder.rglob(".*.part"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)
        world.barrier()
        yield
    finally:
        lock.release()


def check_labels(folder: Path, labels: np.ndarray) -> None:
    """Refuse labels other than those a run began with; the config only names their files."""
    digest, file = hashlib.sha256(labels.tobytes()).hexdigest(), folder / "labels.sha256"
    if not file.exists():
        write_whole(file, digest.encode())
    elif file.read_text() != digest:
        problem = f"{folder} was trained on other labels than its settings give now"
        raise InputError(f"{problem}; move it away to train anew, or bring the old labels back")
