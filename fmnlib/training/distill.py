"""One network of the original size from a weighted ensemble of checkpoints.

By distillation ("Distilled KF"), or by averaging the weights themselves ("Averaged KF").
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmnlib.config import InputError, RunConfig
from fmnlib.fusion import Fusion
from fmnlib.record import RunRecord
from fmnlib.training import data as datasets
from fmnlib.training.augment import draw, moved
from fmnlib.training.checkpoint import checkpoint_path, load_tensors, save_tensors
from fmnlib.training.dataset import Bank, Data, DataSet
from fmnlib.training.folder import once
from fmnlib.training.models import arithmetic, average_weights, mix_probs, reestimate_batchnorm
from fmnlib.training.parallel import join
from fmnlib.training.recorder import provenance
from fmnlib.training.step import Criterion
from fmnlib.training.train import build_model, evaluate, pick_device, predict, train

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
    fields = dataclasses.asdict(config) | loss | {"keep_every": config.epochs, "keep": ()}
    return RunConfig(**fields | {"teacher": teacher})


def distill(
    config: RunConfig,
    members: Sequence[Member],
    folder: Path,
    *,
    device: str = "auto",
    progress: bool = True,
    deadline: float = math.inf,
) -> RunRecord:
    """Train a student of the networks `members` and return its record.

    The loss of Hinton, Vinyals and Dean (2015): with share a and temperature T,
    a T^2 CE(teacher^(1/T), softmax(z / T)) + (1 - a) CE(label, softmax(z)). The teacher sees the
    same augmented view as the student; without augmentation its outputs are computed once, and
    with `config.teacher_views` once for each of so many views.

    Args:
        config: The student, as `student_config` made it.
        members: The teacher's networks; their weights sum to 1.
        folder: The student's own folder.
        device: As in `train`.
        progress: Show a bar.
        deadline: As in `train`.

    Raises:
        InputError: If the teacher has no members, or their weights do not sum to 1.
    """
    _check_sum(members)
    data = datasets.load(config, join(pick_device(device))[1])
    if config.teacher_views and config.augment != "none":
        if not isinstance(data, DataSet):
            raise InputError(
                "teacher_views are of images in memory; make it 0, or use folder:PATH"
            )
        data = dataclasses.replace(data, bank=_bank(config, data))
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
        deadline=deadline,
    )


def average(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str = "auto"
) -> RunRecord:
    """Average the weights of `members` into one network, and record its predictions.

    BatchNorm's statistics are estimated anew on the training images. The record has one epoch.
    """
    _check_sum(members)
    return once(config, folder, lambda: _averaged(config, members, folder, pick_device(device)))


def _averaged(
    config: RunConfig, members: Sequence[Member], folder: Path, device: torch.device
) -> RunRecord:
    started = time.perf_counter()
    data = datasets.load(config, device)
    states = ((load_network(m, data).state_dict(), m.weight) for m in members)
    model = build_model(config, data)
    model.load_state_dict(average_weights(states))
    every = torch.arange(len(data.labels), device=device)
    reestimate_batchnorm(model, data.views(every.split(500), "none", 0))
    save_tensors(checkpoint_path(folder, 0), model.state_dict(), {})
    probs = evaluate(model, data, config.precision).softmax(1)[None].cpu().numpy()
    record = RunRecord.from_arrays(probs, data.eval_labels.cpu().numpy())
    about = provenance(device, time.perf_counter() - started)
    return dataclasses.replace(record, config=config, provenance=about)


def load_network(member: Member, data: Data) -> nn.Module:
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
    config: RunConfig, data: Data, teacher: Sequence[tuple[nn.Module, float]]
) -> Criterion:
    temperature, share = config.temperature, config.soft_share
    table = _scored_beforehand(config, data, teacher)
    bank = data.bank if isinstance(data, DataSet) else None

    def teach(images: Tensor, index: Tensor) -> Tensor:
        if table is None:
            with arithmetic(config.precision, images.device):
                return mix_probs(teacher, images)
        return table[0, index] if bank is None else table[bank.chosen[index], index]

    def loss(logits: Tensor, images: Tensor, index: Tensor) -> Tensor:
        soft = F.softmax(teach(images, index).clamp_min(1e-12).log() / temperature, dim=1)
        soft_loss = temperature**2 * F.cross_entropy(logits / temperature, soft, reduction="none")
        hard_loss = F.cross_entropy(logits, data.labels[index], reduction="none")
        return share * soft_loss + (1 - share) * hard_loss

    return loss


def _bank(config: RunConfig, data: DataSet) -> Bank:
    """Views of each image that the student chooses among, drawn with its seed."""
    generator = torch.Generator(data.device).manual_seed(config.seed)
    samples, side = len(data.labels), data.shape[-1]
    views = range(config.teacher_views)
    moves = torch.stack([draw(config.augment, side, samples, generator) for _ in views])
    return Bank(moves, torch.zeros(samples, dtype=torch.long, device=data.device))


@torch.no_grad()
def _scored_beforehand(
    config: RunConfig, data: Data, teacher: Sequence[tuple[nn.Module, float]]
) -> Tensor | None:
    """The teacher's probabilities `[views, samples, classes]`; None where views never recur."""
    if not isinstance(data, DataSet) or (config.augment != "none" and data.bank is None):
        return None
    all_images = [data.images] if data.bank is None else _banked(data.images, data.bank)
    views = []
    for images in all_images:
        said = (w * predict(net, data, images, config.precision).softmax(1) for net, w in teacher)
        views.append(torch.stack(list(said)).sum(0))
    return torch.stack(views)


def _banked(images: Tensor, bank: Bank) -> Iterator[Tensor]:
    """The training images in each of their views."""
    return (moved(images, moves) for moves in bank.moves)
