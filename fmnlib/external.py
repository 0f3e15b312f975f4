"""Networks that were trained elsewhere: run their checkpoints, fuse them, write one network."""

import json
import runpy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmnlib import models, training
from fmnlib.checkpoint import checkpoint_path, load_tensors
from fmnlib.config import CheckpointFiles, InputError, RunConfig, StudentConfig
from fmnlib.data import DataSet
from fmnlib.distillation import teacher_criterion
from fmnlib.files import write_whole
from fmnlib.fusion import Fusion
from fmnlib.images import ImageFiles, Preprocessing, open_folder
from fmnlib.record import RunRecord
from fmnlib.stats import gain_rows, gains, picks
from fmnlib.weights import Kind, checkpoint_names, find_checkpoints, fit, read_state, write_state

Search = Callable[[RunRecord], Fusion]
Maker = Callable[[], nn.Module]


def fuse_files(files: CheckpointFiles, search: Search, split: int) -> dict[str, Any]:
    """Run the checkpoints on the images, fuse them, write one network, and report its accuracy.

    Args:
        files: Checkpoints, images, and the files to write.
        search: Finds the fusion on the validation half.
        split: Seed that draws the halves.

    Returns:
        Test accuracies, gains with intervals, picks and files written, by name.

    Raises:
        InputError: If a file or folder is missing or does not fit, or would be overwritten.
    """
    mixture_file = _check(files)
    fields = {name: getattr(files, name) for name in ("size", "resize", "mean", "std")}
    preprocessing = Preprocessing(**fields)
    device, paths = training.pick_device(files.device), find_checkpoints(files.checkpoints)
    if split < 0:
        raise InputError(f"the split's seed is {split}; give 0 or more")
    search(RunRecord.from_arrays(np.full((len(paths), 1, 2), 0.5), [0]))  # may refuse its options
    images = open_folder(files.data or Path(), preprocessing)
    train = None if files.train is None else open_folder(files.train, preprocessing)
    if train is not None and train.classes != images.classes:
        raise InputError(f"the classes in {files.data} and {files.train} differ; make them equal")
    make = maker(files.model, classes=len(images.classes), preprocessing=preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        record = record_checkpoints(
            make(), paths, images, device=device, folder=Path(folder), kind=files.weights
        )
        images.close()
        _refuse_guessing(record)
        if files.save_record is not None:
            record.save(files.save_record)
        val, test = record.split(split)
        fusion = search(val)
        members = weighted(paths, fusion)
        assert val.index is not None
        chosen_on = images.take(val.index)
        where: Any = {"device": device, "kind": files.weights}
        if files.network == "distilled" and train is not None:
            data = _data_set(train, chosen_on, device)
            network = distill_checkpoints(
                make, members, data, epochs=files.epochs, lr=files.lr, **where
            )
        else:
            source = train or chosen_on
            # In order of class, a batch would have the statistics of one class.
            order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
            batches = source.read(order.split(100))
            normalized = (preprocessing.normalize(batch.to(device)) for batch in batches)
            network = average_checkpoints(make, members, normalized, **where)
            source.close()
        write_state(files.output, network.state_dict())
        names = checkpoint_names(paths)
        mixture = {"checkpoints": names, "weights": fusion.weights.tolist()}
        mixture |= {"classes": images.classes, "preprocessing": str(preprocessing)}
        write_whole(mixture_file, json.dumps(mixture, indent=1).encode())
        assert test.index is not None
        test_images = images.take(test.index)
        written = record_checkpoints(make(), [files.output], test_images, device=device)
        table = gains(val, test, fusion, {files.network: written.correct[0]})
    size = f"{len(record.labels)} of {len(images.classes)} classes; {preprocessing}"
    report: dict[str, Any] = {"checkpoints": len(paths), "first": names[0], "final": names[-1]}
    report |= {"images": size} | gain_rows(table)
    report |= picks(fusion, names) | {"networks": fusion.networks}
    return report | {"written": f"{files.output}, {mixture_file}"}


def maker(name: str, *, classes: int, preprocessing: Preprocessing) -> Maker:
    """A function that makes the network of a name, with fresh weights.

    The name is torchvision:NAME, another one of `fmn train --model`, or FILE.py:FUNCTION, a
    function of yours that takes no argument; it is run.
    """
    file, _, function = name.rpartition(":")
    if name.endswith(".py"):
        raise InputError(f"model is {name!r}, which function of it? Give {name}:FUNCTION")
    if not file.endswith(".py"):
        channels, side = len(preprocessing.mean), preprocessing.size
        return lambda: models.build(name, classes=classes, channels=channels, side=side)
    if not Path(file).is_file():
        raise InputError(f"model is {name!r}, but {file} does not exist; give FILE.py:FUNCTION")
    try:
        make = runpy.run_path(file).get(function)
    except Exception as error:  # whatever a file of the user's raises
        raise InputError(f"{file} cannot be imported ({error!r}); run it by itself") from error
    if not callable(make):
        raise InputError(f"{file} has no function {function!r}; give FILE.py:FUNCTION")
    try:
        network = make()
    except Exception as error:  # whatever a function of the user's raises
        problem = f"{name} cannot be called ({error!r})"
        raise InputError(f"{problem}; it must need no argument, and return the network") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{name} returned a {type(network).__name__}; return the network")
    return make


def record_checkpoints(
    model: nn.Module,
    paths: Sequence[Path],
    images: ImageFiles,
    *,
    device: torch.device,
    folder: Path | None = None,
    kind: Kind = "model",
) -> RunRecord:
    """The record of checkpoints on labelled images; an "epoch" is a checkpoint.

    The files are in the order of training; the model takes the weights of one after the other.
    With a folder, probabilities are kept in a file there, mapped, instead of in memory.
    """
    model.to(device)
    loaded = images.load() if images.fits() else None
    shape = (len(paths), len(images), len(images.classes))
    probs = np.empty(shape, np.float16)
    if folder is not None:
        probs = np.lib.format.open_memmap(folder / "probs.npy", "w+", np.float16, shape)
    predicted = np.empty(shape[:2], np.int32)
    order = torch.arange(len(images)).split(100)
    for row, path in enumerate(tqdm(paths, "predicting", unit="checkpoint")):
        fit(model, read_state(path, kind), str(path))
        batches = images.read(order) if loaded is None else loaded.split(100)
        for index, batch in zip(order, batches, strict=True):
            logits = _logits(model, images.preprocessing.normalize(batch.to(device)))
            if logits.shape[1] != shape[2]:
                problem = f"the model has {logits.shape[1]} outputs for {shape[2]} class folders"
                raise InputError(f"{problem}; give the data that it was trained on")
            if not logits.isfinite().all():
                raise InputError(f"{path} predicts NaN: its training diverged; leave it out")
            rows = logits.softmax(1).numpy()
            predicted[row, index.numpy()] = rows.argmax(1)  # before float16 makes ties
            probs[row, index.numpy()] = rows
    return RunRecord(
        labels=images.labels,
        predicted=predicted,
        kept=np.arange(len(paths)),
        probs=probs,
        classes=shape[2],
        provenance={"checkpoints": checkpoint_names(paths), "classes": images.classes},
    )


def weighted(paths: Sequence[Path], fusion: Fusion) -> list[tuple[Path, float]]:
    """The checkpoints that have weight in a fusion, and their weights."""
    return [(path, float(w)) for path, w in zip(paths, fusion.weights, strict=True) if w]


def average_checkpoints(
    make: Maker,
    members: Sequence[tuple[Path, float]],
    batches: Iterable[Tensor],
    *,
    device: torch.device | str = "cpu",
    kind: Kind = "model",
) -> nn.Module:
    """The network of the mean weights of checkpoints ("Averaged KF"), as `weighted` gives them.

    BatchNorm's statistics, if there are any, are estimated again on the batches: images as the
    network takes them.
    """
    states = (
        (fit(make(), read_state(path, kind)).state_dict(), weight) for path, weight in members
    )
    return models.load_average(make().to(device), states, batches)


def distill_checkpoints(
    make: Maker,
    members: Sequence[tuple[Path, float]],
    data: DataSet,
    *,
    epochs: int = 10,
    lr: float = 0.01,
    device: torch.device | str = "cpu",
    kind: Kind = "model",
) -> nn.Module:
    """A student that learns from the mixture of checkpoints, as `weighted` gives them.

    It starts from the heaviest checkpoint and is trained as `fmnlib.distillation.distill` trains,
    with `lr` as the peak learning rate. Images are not augmented: the mixture predicts them once.
    """
    settings = StudentConfig(teacher="checkpoints")
    config = RunConfig(epochs=epochs, lr=lr, keep_every=epochs, student=settings)
    teacher = [
        (fit(make(), read_state(path, kind)).to(device), weight) for path, weight in members
    ]
    heaviest = max(members, key=lambda member: member[1])[0]
    student = make()
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            config,
            Path(folder),
            device=str(device),
            data=data,
            criterion=teacher_criterion(config, data, teacher),
            build=make,
            initial=fit(make(), read_state(heaviest, kind)).state_dict(),
        )
        student.load_state_dict(load_tensors(checkpoint_path(Path(folder), epochs - 1)))
    return student.to(device).eval()


def _data_set(train: ImageFiles, val: ImageFiles, device: torch.device) -> DataSet:
    """Training images, and validation images that are predicted after each epoch."""
    labels, val_labels = (torch.from_numpy(part.labels).to(device) for part in (train, val))
    images, val_images = (part.load().to(device) if part.fits() else part for part in (train, val))
    return DataSet(
        images=images,
        labels=labels,
        flipped=torch.zeros_like(labels, dtype=torch.bool),
        eval_images=val_images,
        eval_labels=val_labels,
        classes=len(train.classes),
        mean=torch.tensor(train.preprocessing.mean, device=device),
        std=torch.tensor(train.preprocessing.std, device=device),
    )


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            outputs = model(batch)
        return torch.as_tensor(getattr(outputs, "logits", outputs)).float().cpu()
    except (RuntimeError, TypeError, AttributeError) as error:
        reason, shape = str(error).partition("\n")[0], list(batch.shape[1:])
        problem = f"the model gives no logits for images of shape {shape} ({reason})"
        raise InputError(f"{problem}; check their size and the number of means") from error


def _refuse_guessing(record: RunRecord) -> None:
    best, guess = float(record.accuracy.max()), 1 / record.classes
    if best <= guess + 2 * (guess * (1 - guess) / len(record.labels)) ** 0.5:
        problem = f"no checkpoint is right more often than guessing, {best:.1%} at best"
        raise InputError(f"{problem}; check --size, --mean, --std and the order of class folders")


def _check(files: CheckpointFiles) -> Path:
    """Refuse what cannot end well before the long work begins; the path of the second output."""
    if not files.model or files.data is None:
        raise InputError("--checkpoints needs --model NAME and --data FOLDER of validation images")
    if files.network == "distilled" and files.train is None:
        raise InputError("--network distilled needs --train FOLDER of training images")
    if files.train is not None and files.train.resolve() == files.data.resolve():
        problem = f"data and train are both {files.data}"
        raise InputError(f"{problem}; a student that is taught on the test half proves nothing")
    if files.save_record is not None and files.save_record.suffix != ".npz":
        raise InputError(f"save_record is {files.save_record}; give a name that ends in .npz")
    if files.output.suffix != ".safetensors":
        raise InputError(f"output is {files.output}; give a name that ends in .safetensors")
    mixture_file = files.output.with_suffix(".json")
    for path in filter(None, (files.output, mixture_file, files.save_record)):
        if path.exists():
            raise InputError(f"{path} exists; give another name, or move it away")
        parent = next(p for p in path.absolute().parents if p.exists())
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            problem = f"{path} cannot be written ({error.strerror})"
            raise InputError(f"{problem}; give another folder") from error
    return mixture_file
