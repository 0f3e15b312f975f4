"""Test-time augmentation: the mean prediction over several views of each image."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fmnlib.config import RunConfig
from fmnlib.record import RunRecord
from fmnlib.training import data as datasets
from fmnlib.training.distill import Member, load_network
from fmnlib.training.folder import once
from fmnlib.training.recorder import provenance
from fmnlib.training.train import pick_device, predict

__all__ = ["half_shifts", "predict_views"]


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
    """Record what a weighted ensemble says on the mean of several views; the record has one epoch.

    Args:
        config: Names the ensemble, as `student_config` does.
        members: Its networks; their weights sum to 1.
        folder: The record's own folder.
        device: As in `fmnlib.training.train.train`.
    """
    return once(config, folder, lambda: _on_views(config, members, pick_device(device)))


def _on_views(config: RunConfig, members: Sequence[Member], device: torch.device) -> RunRecord:
    started = time.perf_counter()
    data = datasets.in_memory(config, device)
    views = half_shifts(data.eval_images)
    probs = torch.zeros(len(data.eval_labels), data.classes, device=device)
    for member in members:
        net = load_network(member, data)
        said = torch.stack(
            [predict(net, data, view, config.precision).softmax(1) for view in views]
        )
        probs += member.weight * said.mean(0)
    record = RunRecord.from_arrays(probs[None].cpu().numpy(), data.eval_labels.cpu().numpy())
    about = provenance(device, time.perf_counter() - started)
    return dataclasses.replace(record, config=config, provenance=about)
