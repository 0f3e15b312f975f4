"""What the notebooks make from trained networks beside ensembles and students.

Linear models on the inputs of the last layer, test-time augmentation, transfer to other classes.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmnlib import runs
from fmnlib.checkpoint import load_or_create
from fmnlib.config import InputError, RunConfig
from fmnlib.data import DataSet, load
from fmnlib.distillation import Member, load_network, members_of, student_config
from fmnlib.fusion import Fusion
from fmnlib.images import ImageFiles
from fmnlib.paper.theory import truncated_predictions
from fmnlib.record import RunRecord
from fmnlib.recorder import provenance
from fmnlib.runs import Job
from fmnlib.training import pick_device, predict


def pixels(images: Tensor) -> Float[np.ndarray, "samples features"]:
    """Raw images as rows of numbers from 0 to 1.

    >>> pixels(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist()
    [[0.0, 1.0]]
    """
    return images.flatten(1).cpu().double().numpy() / 255


def learned_features(
    model: nn.Module, data: DataSet, images: Tensor | ImageFiles
) -> Float[np.ndarray, "samples features"]:
    """The inputs of a network's last linear layer, for uint8 images."""
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    features: list[Tensor] = []
    handle = last.register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].flatten(1))
    )
    try:
        predict(model, data, images)
    finally:
        handle.remove()
    return torch.cat(features).cpu().double().numpy()


def predict_truncated(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str = "auto"
) -> RunRecord:
    """Record the predictions of linear models on features, one "epoch" for each component.

    They are fitted to the labels that the network was trained on, noise included; row k is W(k)
    of `fmnlib.paper.theory.truncated_predictions`.

    Args:
        config: Names the network, as `student_config` does.
        members: The network, one checkpoint alone.
        folder: The record's own folder.
        device: As in `fmnlib.training.train`.

    Raises:
        InputError: If there is more than one network.
    """
    if len(members) != 1:
        raise InputError(f"features are of one network, not of {len(members)}; give one epoch")
    return load_or_create(
        config, folder, lambda: _truncated(config, members[0], pick_device(device))
    )


def _truncated(config: RunConfig, member: Member, device: torch.device) -> RunRecord:
    started = time.perf_counter()
    data = load(config, device)
    net = load_network(member, data)
    inputs, evaluated = (learned_features(net, data, x) for x in (data.images, data.eval_images))
    labels = data.labels.cpu().numpy()
    return RunRecord(
        labels=data.eval_labels.cpu().numpy(),
        predicted=truncated_predictions(inputs, labels, evaluated, data.classes),
        kept=np.arange(0),
        probs=None,
        classes=data.classes,
        config=config,
        provenance=provenance(device, time.perf_counter() - started),
    )


def half_shifts(images: Tensor) -> list[Tensor]:
    """Each image, and its like moved by half a pixel up, down, left and right.

    A move by half a pixel is the mean of the image and its like moved by one, with black moving
    in. For images of 8 pixels a whole one would be a move by an eighth.

    Args:
        images: `[samples, channels, side, side]`.

    >>> [view[0, 0].tolist() for view in half_shifts(torch.tensor([[[[4, 8]]]]))[3:]]
    [[[6.0, 4.0]], [[2.0, 6.0]]]
    """
    whole = images.float()
    padded = torch.nn.functional.pad(whole, (1, 1, 1, 1))
    rows, columns = images.shape[-2:]
    corners = [(2, 1), (0, 1), (1, 2), (1, 0)]
    moved = [padded[..., y : y + rows, x : x + columns] for y, x in corners]
    return [whole, *((whole + move) / 2 for move in moved)]


def predict_views(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str = "auto"
) -> RunRecord:
    """Record the mean prediction of an ensemble over several views; the record has one epoch.

    Args:
        config: Names the ensemble, as `student_config` does.
        members: Its networks; their weights sum to 1.
        folder: The record's own folder.
        device: As in `fmnlib.training.train`.
    """
    return load_or_create(config, folder, lambda: _on_views(config, members, pick_device(device)))


def _on_views(config: RunConfig, members: Sequence[Member], device: torch.device) -> RunRecord:
    started = time.perf_counter()
    data = load(config, device)
    images = data.eval_images
    views = half_shifts(images if isinstance(images, Tensor) else images.load().to(device))
    probs = torch.zeros(len(data.eval_labels), data.classes, device=device)
    for member in members:
        net = load_network(member, data)
        predictions = torch.stack(
            [predict(net, data, view, config.precision).softmax(1) for view in views]
        )
        probs += member.weight * predictions.mean(0)
    record = RunRecord.from_arrays(probs[None].cpu().numpy(), data.eval_labels.cpu().numpy())
    about = provenance(device, time.perf_counter() - started)
    return dataclasses.replace(record, config=config, provenance=about)


def viewed(config: RunConfig, name: str, fusion: Fusion) -> Job:
    """The job of test-time augmentation: a fusion's mean prediction over views of each image."""
    members = members_of(config, runs.folder(config), fusion)
    return Job(student_config(config, f"views_{name}", members), tuple(members), predict_views)


def truncated(config: RunConfig) -> Job:
    """The job of truncated linear models on the features of a run's final network.

    The record has an "epoch" for each component; see `predict_truncated`.
    """
    last = Member(config, runs.folder(config), config.epochs - 1, weight=1.0)
    return Job(student_config(config, "truncated", [last]), (last,), predict_truncated)


def transferred(config: RunConfig, source: RunConfig) -> Job:
    """The job of a run that starts from the final weights of another, such as of other classes."""
    final = Member(source, runs.folder(source), source.epochs - 1, 1.0)
    named = student_config(config, "transfer", [final], soft_share=0.0, init="teacher")
    return Job(dataclasses.replace(named, keep_every=config.keep_every), (final,))
