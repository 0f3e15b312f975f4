"""Checkpoint files of other programs: find them, read their weights, load these, write our own.

Files are safetensors, or `.pt` and the like as `torch.save` writes them. Only tensors and plain
containers are unpickled (torch's `weights_only`): an object of any other class, such as one among
the hyper-parameters, is replaced by an empty one.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from fmnlib.config import InputError
from fmnlib.files import write_whole
from fmnlib.models import State

Kind = Literal["model", "ema"]
"""The weights that were trained, or their moving average."""

# Names of entries: of timm, torchvision, Lightning's WeightAveraging, and the usual ones.
_ENTRIES = {
    "model": ("current_model_state", "state_dict", "model_state_dict", "model"),
    "ema": ("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
}


class _Ignored:
    """Placeholder for an object of any other class in a file; its content is ignored."""

    def __new__(cls, *args: Any, **options: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def find_checkpoints(pattern: str) -> list[Path]:
    """The files that match a pattern, in natural order, without those of `write_state_dict`.

    An `InputError` if there are fewer than two, or one seems to be a copy of another, such as
    best.ckpt: the last file is taken for the final network.
    """
    pattern = str(Path(pattern).expanduser())
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural)
    if odd := [path for path in matches if not path.is_file()]:  # a pipe would hang
        raise InputError(f"{odd[0]} is not a file; give a pattern that leaves it out")
    paths = [path for path in matches if not _is_ours(path)]
    if len(paths) < 2:
        count = f"{len(paths)} files match {pattern!r}"
        raise InputError(f"{count}; give two checkpoints or more, in quotes: 'ckpt/*.safetensors'")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [path.parent.name for path in paths]
    numbered = [name for name in names if re.search(r"\d", name)]
    copies = [
        name
        for name in names
        if re.search(r"(?<![a-z])(best|last|latest)(?![a-z])", name.lower())
        or (numbered and name not in numbered)
    ]
    if copies:
        rest = [path for path, name in zip(paths, names, strict=True) if name not in copies]
        problem = f"{', '.join(copies[:3])} may be a copy of another checkpoint"
        remedy = f"give a pattern without it, such as {_pattern(rest)!r}"
        raise InputError(f"{problem}; {remedy}, or a name with its epoch")
    return paths


def _pattern(paths: Sequence[Path]) -> str:
    """A simple glob pattern that exactly these files match, if there is one; else an example."""
    if paths:
        # Names are taken to differ only between their first and their last digit.
        found = str(paths[0].with_name(re.sub(r"\d(.*\d)?", "[0-9]*", paths[0].name)))
        if set(map(Path, glob.glob(found))) == set(paths):
            return found
    return "ckpt/*[0-9].pt"


def checkpoint_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell files apart: their own, their folders' where those are equal, or paths.

    >>> checkpoint_names([Path("a/checkpoint-1/model.bin"), Path("a/checkpoint-2/model.bin")])
    ['checkpoint-1', 'checkpoint-2']
    """
    for names in ([p.name for p in paths], [p.parent.name for p in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_state_dict(path: Path, kind: Kind = "model") -> dict[str, Tensor]:
    """The state dictionary in a file, on the CPU: of the trained weights, or their moving average.

    An `InputError` if the file is damaged, lacks the entry, or holds no state dictionary.
    """
    foreign = _foreign(path)
    objects = f"objects of {', '.join(foreign)}"
    try:
        stored = _load(path, foreign)
    except Exception as error:  # zip, pickle, torch and safetensors raise a dozen kinds
        message = " ".join(str(error).split())[:90] or "it ends too early"
        reason = f"it holds {objects}" if foreign else message
        raise InputError(f"{path} cannot be read ({reason}); save its state_dict") from error
    mapping = dict(stored) if isinstance(stored, Mapping) else {}
    entries = [name for name in _ENTRIES[kind] if isinstance(mapping.get(name), Mapping)]
    if kind == "ema" and not entries and "current_model_state" in mapping:
        entries = ["state_dict"]  # Lightning puts the average there
    if kind == "ema" and not entries:
        problem = f"{path} has no moving average ({', '.join(_ENTRIES['ema'])})"
        raise InputError(f"{problem} but {_listed(mapping)}; leave out --weights ema")
    state = dict(mapping[entries[0]]) if entries else mapping
    if not state or not all(map(torch.is_tensor, state.values())):
        content = _listed(mapping) if mapping else type(stored).__name__
        if any(isinstance(value, _Ignored) for value in (stored, *state.values())):
            content = objects
        raise InputError(f"{path} holds no state_dict but {content}; save model.state_dict()")
    return state


def write_state_dict(path: Path, state: State) -> None:
    """Write a plain state dictionary that `safetensors.torch.load_file` reads, and no more."""
    tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in state.items()}
    write_whole(path, safetensors.torch.save(tensors, {"format": "pt", "by": "fmnlib"}))


def load_weights(model: nn.Module, state: State, name: str = "the checkpoint") -> nn.Module:
    """Load weights into a model, and set it to evaluation.

    A prefix, such as `module.` of a parallel model or the attribute of a LightningModule, is
    removed, and names without it are ignored. An `InputError` if names or shapes then differ.

    >>> state = {"net.weight": torch.ones(1, 1), "net.bias": torch.zeros(1)}
    >>> load_weights(nn.Linear(1, 1), state).bias
    Parameter containing:
    tensor([0.], requires_grad=True)
    """
    own = model.state_dict()
    first = next(iter(own), "")
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    fitting = []
    for prefix in dict.fromkeys(("", *prefixes)):
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        fitting += [(prefix, inner)] if inner.keys() == own.keys() else []
    if len(fitting) > 1:
        problem = f"{name} holds {' and '.join(prefix for prefix, _ in fitting)}"
        raise InputError(f"{problem}, any of which fits; save the state_dict of one network")
    inner = fitting[0][1] if fitting else inner
    differing = inner.keys() ^ own.keys() or {k for k in own if own[k].shape != inner[k].shape}
    if differing:
        key = min(differing)
        shapes = [list(s[key].shape) if key in s else "none" for s in (inner, own)]
        problem = f"{name} does not fit: {key} is {shapes[0]} in it and {shapes[1]} in the model"
        raise InputError(f"{problem}; check the model's name and the number of class folders")
    model.load_state_dict(inner)
    return model.eval()


def _foreign(path: Path) -> list[str]:
    """The names of the classes and functions in a file that torch does not load by itself."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # safetensors, no zip file, damaged: `_load` tells
        return []


def _load(path: Path, foreign: Sequence[str]) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    ignored: list[Any] = [(_Ignored, name) for name in foreign]
    with torch.serialization.safe_globals(ignored):
        return torch.load(path, map_location="cpu", weights_only=True)


def _listed(holds: Mapping[str, Any]) -> str:
    names = list(map(str, holds))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")


def _is_ours(path: Path) -> bool:
    """Whether `write_state_dict` has written a file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("by") == "fmnlib"
    except (OSError, safetensors.SafetensorError):
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
