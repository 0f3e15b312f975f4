"""Checkpoints that are there already: find them, read them, run them, write one network of them.

Files may be safetensors, or `.pt` and the like as `torch.save` writes them; nothing is unpickled
but tensors and plain containers (`weights_only=True`).
"""

import dataclasses
import glob
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmnlib.config import InputError
from fmnlib.files import write_whole
from fmnlib.outside.pictures import Pictures, View
from fmnlib.record import RunRecord
from fmnlib.training.models import build

__all__ = [
    "find_checkpoints",
    "fit",
    "maker",
    "read_state",
    "record_checkpoints",
    "write_state",
]

State = Mapping[str, Tensor]
Maker = Callable[[], nn.Module]


def find_checkpoints(pattern: str) -> list[Path]:
    """The files that match a pattern, in natural order: epoch_2 before epoch_10.

    Networks that `write_state` has written are no checkpoints, and left out.

    Raises:
        InputError: If there are fewer than two.
    """
    pattern = str(Path(pattern).expanduser())
    every = sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural)
    found = [path for path in every if not _is_ours(path)]
    if len(found) < 2:
        told = f"{len(found)} files match {pattern!r}"
        raise InputError(f"{told}; give two checkpoints or more, in quotes: 'ckpt/*.safetensors'")
    return found


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dictionary in a file, on the CPU.

    Of a file that holds more, such as an optimiser's state, the entry "state_dict",
    "model_state_dict" or "model".

    Raises:
        InputError: If the file is damaged, or holds more than tensors and plain containers.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, torch and safetensors raise a dozen kinds
        reason = " ".join(str(error).split())[:90] or "it ends too early"
        raise InputError(f"{path} cannot be read ({reason}); save its state_dict") from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(stored, Mapping) and isinstance(stored.get(name), Mapping):
            stored = stored[name]
    if not isinstance(stored, Mapping) or not all(torch.is_tensor(t) for t in stored.values()):
        held = (
            ", ".join(map(str, stored))[:90]
            if isinstance(stored, Mapping)
            else type(stored).__name__
        )
        raise InputError(f"{path} holds no state_dict but {held}; save model.state_dict()")
    return dict(stored)


def write_state(path: Path, state: State) -> None:
    """Write a plain state dictionary that `safetensors.torch.load_file` reads, and no more."""
    tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in state.items()}
    write_whole(path, safetensors.torch.save(tensors, {"format": "pt", "by": "fmnlib"}))


def fit(model: nn.Module, state: State, name: str = "the checkpoint") -> nn.Module:
    """Load weights into a model, and set it to evaluation.

    A prefix that all names share, such as `module.` of a parallel model or the attribute of a
    LightningModule, is left out.

    Raises:
        InputError: If names or shapes differ from the model's.

    >>> fit(nn.Linear(1, 1), {"net.weight": torch.ones(1, 1), "net.bias": torch.zeros(1)}).bias
    Parameter containing:
    tensor([0.], requires_grad=True)
    """
    wanted = model.state_dict()
    first = next(iter(wanted), "")
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    for prefix in ("", *prefixes):
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if inner.keys() == wanted.keys():
            break
    differ = sorted(inner.keys() ^ wanted.keys()) or sorted(
        key for key in wanted if wanted[key].shape != inner[key].shape
    )
    if differ:
        key = differ[0]
        shapes = [list(s[key].shape) if key in s else "none" for s in (inner, wanted)]
        told = f"{name} does not fit: {key} is {shapes[0]} in it and {shapes[1]} in the model"
        raise InputError(f"{told}; check the model's name and the number of class folders")
    model.load_state_dict(inner)
    return model.eval()


def maker(name: str, *, classes: int, view: View) -> Maker:
    """A function that makes the network, with fresh weights.

    Args:
        name: torchvision:NAME, another name that `fmn train --model` knows, or
            FILE.py:FUNCTION, a function of yours that takes no argument. It is run.
        classes: Number of outputs.
        view: Gives the side and the channels of the images.
    """
    file, _, function = name.rpartition(":")
    if name.endswith(".py"):
        raise InputError(f"model is {name!r}, which function of it? Give {name}:FUNCTION")
    if not file.endswith(".py"):
        shape = {"classes": classes, "channels": len(view.mean), "side": view.size}
        return lambda: build(name, **shape)
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    if not Path(file).is_file() or found is None or found.loader is None:
        raise InputError(f"model is {name!r}, but {file} does not exist; give FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever a file of the user's raises
        raise InputError(f"{file} cannot be imported ({error!r}); run it by itself") from error
    if not callable(getattr(module, function, None)):
        raise InputError(f"{file} has no function {function!r}; give FILE.py:FUNCTION")
    make = getattr(module, function)
    try:
        made = make()
    except Exception as error:  # whatever a function of the user's raises
        told = f"{name} cannot be called ({error!r})"
        raise InputError(f"{told}; it must need no argument, and return the network") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returned a {type(made).__name__}; return the network")
    return make


@torch.no_grad()
def record_checkpoints(
    model: nn.Module,
    paths: Sequence[Path],
    pictures: Pictures,
    view: View,
    *,
    device: torch.device,
    batch: int = 100,
) -> RunRecord:
    """The record of checkpoints on labelled images; an "epoch" is a checkpoint.

    Args:
        model: Takes the weights of one after the other.
        paths: Files, in the order of training.
        pictures: What to classify.
        view: How the model sees it.
        device: Where to compute.
        batch: Images at a time.
    """
    model.to(device)
    probs = []
    for path in tqdm(paths, "predicting", unit="checkpoint"):
        fit(model, read_state(path), str(path))
        parts = pictures.images.split(batch)
        try:
            said = (model(view.normalize(part.to(device))) for part in parts)
            logits = [getattr(output, "logits", output).float().cpu() for output in said]
        except (RuntimeError, TypeError, AttributeError) as error:
            reason, shape = str(error).partition("\n")[0], list(parts[0].shape[1:])
            told = f"the model gives no logits for images of shape {shape} ({reason})"
            raise InputError(f"{told}; check their size and the number of means") from error
        probs.append(torch.cat(logits).softmax(1))
        if not probs[-1].isfinite().all():
            raise InputError(f"{path} predicts NaN: its training diverged; leave it out")
    stacked = torch.stack(probs)
    if stacked.shape[2] != len(pictures.classes):
        told = f"the model has {stacked.shape[2]} outputs for {len(pictures.classes)} folders"
        raise InputError(f"{told} of classes; give a folder of the data it was trained on")
    record = RunRecord.from_arrays(stacked.numpy(), pictures.labels.numpy())
    about = {"checkpoints": [path.name for path in paths], "classes": pictures.classes}
    halves = stacked.half().numpy()  # as records on disk are: what is chosen on them is the same
    return dataclasses.replace(record, probs=halves, provenance=about)


def _is_ours(path: Path) -> bool:
    """Whether `write_state` has written a file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("by") == "fmnlib"
    except (OSError, safetensors.SafetensorError):
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
