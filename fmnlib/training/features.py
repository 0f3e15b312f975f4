"""What a network has learned to see, the inputs of its last layer, and linear models on it."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmnlib.config import InputError, RunConfig
from fmnlib.record import RunRecord
from fmnlib.theory import truncated_predictions
from fmnlib.training import data as datasets
from fmnlib.training.dataset import DataSet
from fmnlib.training.distill import Member, load_network
from fmnlib.training.folder import once
from fmnlib.training.recorder import provenance
from fmnlib.training.train import pick_device, predict

__all__ = ["learned_features", "pixels", "predict_truncated"]


def pixels(images: Tensor) -> Float[np.ndarray, "samples features"]:
    """Raw images as rows of numbers from 0 to 1.

    >>> pixels(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist()
    [[0.0, 1.0]]
    """
    return images.flatten(1).cpu().double().numpy() / 255


def learned_features(
    model: nn.Module, data: DataSet, images: Tensor
) -> Float[np.ndarray, "samples features"]:
    """What a network hands to its last linear layer, for uint8 images."""
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1)))
    try:
        predict(model, data, images)
    finally:
        handle.remove()
    return torch.cat(seen).cpu().double().numpy()


def predict_truncated(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str = "auto"
) -> RunRecord:
    """Record what linear models on a network's features say, one "epoch" for each component.

    They are fitted to the labels that the network was trained on, noise included; row k is W(k)
    of `fmnlib.theory.truncated_predictions`.

    Args:
        config: Names the network, as `student_config` does.
        members: The network, one checkpoint alone.
        folder: The record's own folder.
        device: As in `fmnlib.training.train.train`.

    Raises:
        InputError: If there is more than one network.
    """
    if len(members) != 1:
        raise InputError(f"features are of one network, not of {len(members)}; give one epoch")
    return once(config, folder, lambda: _truncated(config, members[0], pick_device(device)))


def _truncated(config: RunConfig, member: Member, device: torch.device) -> RunRecord:
    started = time.perf_counter()
    data = datasets.in_memory(config, device)
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
