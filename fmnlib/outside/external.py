"""Checkpoints of a training from elsewhere: run them, fuse them, write one network to ship."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from fmnlib.config import InputError
from fmnlib.files import write_whole
from fmnlib.fusion import Fusion
from fmnlib.gains import gains, in_rows, picks
from fmnlib.record import RunRecord

__all__ = ["Files", "fuse_files"]

Numbers = Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative="")]
Search = Callable[[RunRecord], Fusion]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Checkpoints of a training that was not recorded, and what they are to be run on.

    Attributes:
        checkpoints: Pattern of files, in quotes, such as `'ckpt/*.safetensors'` or .pt files.
        model: torchvision:NAME, another name that `fmn train --model` knows, or
            FILE.py:FUNCTION, a function of yours that returns the network.
        data: Folder of validation images, `CLASS/*`; half of them choose, half are reported.
        train: Folder of training images, `CLASS/*`, to distil with.
        network: One network to write: averaged weights, or a distilled student.
        output: File for its weights; the weights of the mixture go beside it as .json.
        save_record: File (.npz) for the predictions of the checkpoints, for `fmn score`.
        size: Side of the images that the network sees, in pixels.
        resize: Shorter side before the middle is cut out, in pixels; 0 takes 256/224 of size.
        mean: Mean a channel, pixels from 0 to 1; one number makes the images grey.
        std: Standard deviation a channel.
        epochs: Epochs of distillation.
        lr: Learning rate of distillation.
        device: cpu, cuda, or auto for a GPU if there is one.
    """

    checkpoints: str = ""
    model: str = ""
    data: Path | None = None
    train: Path | None = None
    network: Literal["averaged", "distilled"] = "averaged"
    output: Path = Path("fused.safetensors")
    save_record: Path | None = None
    size: int = 224
    resize: int = 0
    mean: Numbers = (0.485, 0.456, 0.406)
    std: Numbers = (0.229, 0.224, 0.225)
    epochs: int = 10
    lr: float = 0.01
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise InputError(f"epochs is {self.epochs} and lr is {self.lr}; give more than 0")


def fuse_files(files: Files, search: Search, split: int) -> dict[str, Any]:
    """Run the checkpoints on the images, fuse them, write one network, and say how good it is.

    Args:
        files: What there is, and what to write.
        search: Finds the fusion on the validation half.
        split: Seed that draws the halves.

    Returns:
        Test accuracies, gains with intervals, picks and files written, by name.

    Raises:
        InputError: If a file or folder is missing or does not fit, or would be overwritten.
    """
    from fmnlib.outside import checkpoints, shipping
    from fmnlib.outside.pictures import View, read_pictures
    from fmnlib.training.train import pick_device

    about = _check(files)
    view = View(size=files.size, resize=files.resize, mean=files.mean, std=files.std)
    device, paths = pick_device(files.device), checkpoints.find_checkpoints(files.checkpoints)
    if split < 0:
        raise InputError(f"the split's seed is {split}; give 0 or more")
    search(RunRecord.from_arrays(np.full((len(paths), 1, 2), 0.5), [0]))  # may refuse its options
    pictures = read_pictures(files.data or Path(), view)
    train = None if files.train is None else read_pictures(files.train, view)
    if train is not None and train.classes != pictures.classes:
        raise InputError(f"the classes in {files.data} and {files.train} differ; make them equal")
    make = checkpoints.maker(files.model, classes=len(pictures.classes), view=view)
    record = checkpoints.record_checkpoints(make(), paths, pictures, view, device=device)
    best, guess = float(record.accuracy.max()), 1 / len(pictures.classes)
    if best <= guess + 2 * (guess * (1 - guess) / len(record.labels)) ** 0.5:
        seldom = f"no checkpoint is right more often than guessing, {best:.1%} at best"
        raise InputError(
            f"{seldom}; check --size, --mean, --std and the order of the class folders"
        )
    if files.save_record is not None:
        record.save(files.save_record)
    val, test = record.split(split)
    fusion = search(val)
    if files.network == "distilled" and train is not None:
        network = shipping.distilled(
            make, paths, fusion, train, view, epochs=files.epochs, lr=files.lr, device=device
        )
    else:
        images = pictures.images[_half(record, split, 0)] if train is None else train.images
        network = shipping.averaged(make, paths, fusion, images, view, device=device)
    checkpoints.write_state(files.output, network.state_dict())
    names = [path.name for path in paths]
    mixture = {"checkpoints": names, "weights": fusion.weights.tolist()}
    mixture |= {"classes": pictures.classes, "view": str(view)}
    write_whole(about, json.dumps(mixture, indent=1).encode())
    written = checkpoints.record_checkpoints(make(), [files.output], pictures, view, device=device)
    right: dict[str, np.ndarray] = {files.network: written.correct[0, _half(record, split, 1)]}
    seen = f"{len(record.labels)} of {len(pictures.classes)} classes; {view}"
    told: dict[str, Any] = {"checkpoints": len(paths), "first": names[0], "final": names[-1]}
    told |= {"images": seen} | in_rows(gains(val, test, fusion, right))
    told |= picks(fusion, names) | {"networks": fusion.networks}
    return told | {"written": f"{files.output}, {about}"}


def _check(files: Files) -> Path:
    """Refuse what cannot end well before the long work begins; the path of the second output."""
    if not files.model or files.data is None:
        raise InputError("--checkpoints needs --model NAME and --data FOLDER of validation images")
    if files.network == "distilled" and files.train is None:
        raise InputError("--network distilled needs --train FOLDER of training images")
    if files.train is not None and files.train.resolve() == files.data.resolve():
        told = f"data and train are both {files.data}"
        raise InputError(f"{told}; a student that is taught on the test half proves nothing")
    if files.save_record is not None and files.save_record.suffix != ".npz":
        raise InputError(f"save_record is {files.save_record}; give a name that ends in .npz")
    if files.output.suffix != ".safetensors":
        raise InputError(f"output is {files.output}; give a name that ends in .safetensors")
    about = files.output.with_suffix(".json")
    for path in filter(None, (files.output, about, files.save_record)):
        if path.exists():
            raise InputError(f"{path} exists; give another name, or move it away")
        place = next(p for p in path.absolute().parents if p.exists())
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            told = f"{path} cannot be written ({error.strerror})"
            raise InputError(f"{told}; give another folder") from error
    return about


def _half(record: RunRecord, split: int, half: int) -> np.ndarray:
    """Which samples are in a half of a split: split a record that says where each one was."""
    places = np.arange(len(record.labels))[None].repeat(record.epochs, axis=0)
    return dataclasses.replace(record, predicted=places).split(split)[half].predicted[0]
