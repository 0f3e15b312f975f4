"""What the notebooks make from trained networks besides ensembles and students.

Linear models on the inputs of the last layer, test-time augmentation, transfer to other classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmnlib import runs
from fmnlib.config import RunConfig
from fmnlib.data import DataSet
from fmnlib.distillation import Member, load_network, members_of, student_config
from fmnlib.fusion import Fusion
from fmnlib.images import ImageFiles
from fmnlib.paper.theory import truncated_predictions
from fmnlib.record import RunRecord
from fmnlib.recorder import load_or_create
from fmnlib.runs import Job
from fmnlib.training import pick_device, predict


def pixels(images: Tensor) -> Float[np.ndarray, "samples features"]:
    """Raw images as rows of numbers from 0 to 1.

    >>> pixels(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist()
    [[0.0, 1.0]]
    """
    return images.flatten(1).cpu().double().numpy() / 255


def last_layer_inputs(
    model: nn.Module, data: DataSet, images: Tensor | ImageFiles, precision: str = "auto"
) -> Float[np.ndarray, "samples features"]:
    """The inputs of a network's last linear layer, for uint8 images."""
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    features: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1)))
    try:
        predict(model, data, images, precision)
    finally:
        hook.remove()
    return torch.cat(features).cpu().double().numpy()


def _predict_truncated(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str
) -> RunRecord:
    """Record the predictions of the truncated linear models on one network's features."""

    def fit(data: DataSet) -> RunRecord:
        net, labels = load_network(members[0], data), data.labels.cpu().numpy()
        inputs = last_layer_inputs(net, data, data.images, config.precision)
        evaluated = last_layer_inputs(net, data, data.eval_images, config.precision)
        return RunRecord(
            labels=data.eval_labels.cpu().numpy(),
            predicted=truncated_predictions(inputs, labels, evaluated, data.classes),
            kept=np.arange(0),
            probs=None,
            classes=data.classes,
        )

    return load_or_create(config, folder, pick_device(device), fit)


def _half_shifts(images: Tensor) -> list[Tensor]:
    """Each image `[samples, channels, side, side]`, and it moved by half a pixel each way.

    A move by half a pixel is the mean of the image and of it moved by one, with black moving in;
    a whole pixel would be an eighth of a digit's side. The order is up, down, left, right.
    """
    images = images.float()
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    rows, columns = images.shape[-2:]
    corners = [(2, 1), (0, 1), (1, 2), (1, 0)]
    moved = [padded[..., y : y + rows, x : x + columns] for y, x in corners]
    return [images, *((images + move) / 2 for move in moved)]


def _predict_views(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str
) -> RunRecord:
    """Record the mean prediction of an ensemble over several views; the record has one epoch."""

    def average(data: DataSet) -> RunRecord:
        place, images = data.device, data.eval_images
        views = _half_shifts(images if isinstance(images, Tensor) else images.load().to(place))
        probs = torch.zeros(len(data.eval_labels), data.classes, device=place)
        for member in members:
            net = load_network(member, data)
            each = [predict(net, data, view, config.precision).softmax(1) for view in views]
            probs += member.weight * torch.stack(each).mean(0)
        return RunRecord.from_arrays(probs[None].cpu().numpy(), data.eval_labels.cpu().numpy())

    return load_or_create(config, folder, pick_device(device), average)


def viewed(config: RunConfig, name: str, fusion: Fusion) -> Job:
    """The job of test-time augmentation: a fusion's mean prediction over views of each image."""
    members = members_of(config, runs.folder(config), fusion)
    return Job(student_config(config, f"views_{name}", members), tuple(members), _predict_views)


def truncated(config: RunConfig) -> Job:
    """The job of `truncated_predictions`, an "epoch" each, on features of a run's final network.

    They are fitted to the labels that the network was trained on, noise included.
    """
    final = _final(config)
    return Job(student_config(config, "truncated", [final]), (final,), _predict_truncated)


def transferred(config: RunConfig, source: RunConfig) -> Job:
    """The job of a run that starts from the final weights of another, such as of other classes."""
    final = _final(source)
    named = student_config(config, "transfer", [final], soft_share=0.0, init="teacher")
    return Job(dataclasses.replace(named, keep_every=config.keep_every), (final,))


def _final(config: RunConfig) -> Member:
    return Member(config, runs.folder(config), config.epochs - 1, weight=1.0)
