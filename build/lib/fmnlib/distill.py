"""One network of the original size from a weighted ensemble of checkpoints.

By distillation ("Distilled KF"), or by averaging the weights themselves ("Averaged KF").
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmnlib import data as datasets
from fmnlib.checkpoint import load_tensors, save_tensors
from fmnlib.config import InputError, RunConfig
from fmnlib.data import DataSet
from fmnlib.fusion import Fusion
from fmnlib.models import average_weights, mix_probs, reestimate_batchnorm
from fmnlib.record import RunRecord
from fmnlib.recorder import provenance
from fmnlib.train import (
    Criterion,
    build_model,
    checkpoint_path,
    claim,
    pick_device,
    predict,
    train,
)

__all__ = ["Member", "average", "distill", "load_network", "members_of", "student_config"]


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of a teacher: a checkpoint of a run, and its weight in the mix."""

    config: RunConfig
    folder: Path
    epoch: int
    weight: float


def members_of(config: RunConfig, folder: Path, fusion: Fusion) -> list[Member]:
    """The checkpoints of a run that have weight in a fusion."""
    chosen = fusion.weights.nonzero()[0].tolist()
    return [Member(config, folder, epoch, float(fusion.weights[epoch])) for epoch in chosen]


def student_config(
    config: RunConfig,
    name: str,
    members: Sequence[Member],
    *,
    temperature: float = RunConfig.temperature,
    soft_share: float = RunConfig.soft_share,
) -> RunConfig:
    """The config of a student: the run's own recipe, and the name and digest of its teacher.

    Of a student only the final network is kept.

    Args:
        config: The run whose recipe and network the student takes.
        name: The teacher in a word, such as kf.
        members: The teacher's networks.
        temperature: Softens teacher and student in the soft-target loss.
        soft_share: Weight of the soft-target loss; the rest is the labels' cross-entropy.
    """
    parts = "".join(f"{m.config.id} {m.epoch} {m.weight:.9f}\n" for m in members)
    digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
    teacher = f"{name}-{digest}"
    loss = {"temperature": temperature, "soft_share": soft_share}
    fields = dataclasses.asdict(config) | loss | {"keep_every": config.epochs}
    return RunConfig(**fields | {"teacher": teacher})


def distill(
    config: RunConfig,
    members: Sequence[Member],
    folder: Path,
    *,
    device: str = "auto",
    progress: bool = True,
) -> RunRecord:
    """Train a student of the networks `members` and return its record.

    The loss of Hinton, Vinyals and Dean (2015): with share a and temperature T,
    a T^2 CE(teacher^(1/T), softmax(z / T)) + (1 - a) CE(label, softmax(z)). The teacher sees the
    same augmented view as the student; without augmentation its outputs are computed once.

    Args:
        config: The student, as `student_config` made it.
        members: The teacher's networks; their weights sum to 1.
        folder: The student's own folder.
        device: As in `train`.
        progress: Show a bar.

    Raises:
        InputError: If the teacher has no members, or their weights do not sum to 1.
    """
    _check_sum(members)
    data = datasets.load(config, pick_device(device))
    teacher = [(load_network(member, data), member.weight) for member in members]
    criterion = _criterion(config, data, teacher)
    heaviest = max(members, key=lambda member: member.weight)
    initial = None if config.init == "scratch" else _weights(heaviest)
    return train(
        config,
        folder,
        device=device,
        data=data,
        criterion=criterion,
        initial=initial,
        progress=progress,
    )


def average(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str = "auto"
) -> RunRecord:
    """Average the weights of `members` into one network, and record its predictions.

    BatchNorm's statistics are estimated anew on the training images. The record has one epoch.
    """
    if (folder / "record.npz").exists():
        return RunRecord.load(folder)
    _check_sum(members)
    claim(folder, config)
    started = time.perf_counter()
    data = datasets.load(config, pick_device(device))
    states = ((load_network(m, data).state_dict(), m.weight) for m in members)
    model = build_model(config, data)
    model.load_state_dict(average_weights(states))
    reestimate_batchnorm(model, (data.normalize(part) for part in data.images.split(500)))
    save_tensors(checkpoint_path(folder, 0), model.state_dict(), {})
    probs = predict(model, data, data.eval_images).softmax(1)[None].cpu().numpy()
    record = RunRecord.from_arrays(probs, data.eval_labels.cpu().numpy())
    about = provenance(data.images.device, time.perf_counter() - started)
    dataclasses.replace(record, config=config, provenance=about).save(folder / "record.npz")
    return RunRecord.load(folder)


def load_network(member: Member, data: DataSet) -> nn.Module:
    """A member's network with its weights, in evaluation mode."""
    model = build_model(member.config, data)
    model.load_state_dict(_weights(member))
    return model.eval().requires_grad_(False)


def _weights(member: Member) -> dict[str, Tensor]:
    return load_tensors(checkpoint_path(member.folder, member.epoch))[0]


def _check_sum(members: Sequence[Member]) -> None:
    total = sum(member.weight for member in members)
    if abs(total - 1) > 1e-6:
        count = f"{len(members)} networks"
        raise InputError(f"the weights of the teacher's {count} sum to {total:.6g}; make it 1")


def _criterion(
    config: RunConfig, data: DataSet, teacher: Sequence[tuple[nn.Module, float]]
) -> Criterion:
    temperature, share = config.temperature, config.soft_share
    table: Tensor | None = None
    if config.augment == "none":  # every epoch shows the teacher the same views
        views = (weight * predict(net, data, data.images).softmax(1) for net, weight in teacher)
        table = torch.stack(list(views)).sum(0)

    def loss(logits: Tensor, images: Tensor, index: Tensor) -> Tensor:
        probs = mix_probs(teacher, images) if table is None else table[index]
        soft = F.softmax(probs.clamp_min(1e-12).log() / temperature, dim=1)
        soft_loss = temperature**2 * F.cross_entropy(logits / temperature, soft, reduction="none")
        hard_loss = F.cross_entropy(logits, data.labels[index], reduction="none")
        return share * soft_loss + (1 - share) * hard_loss

    return loss
