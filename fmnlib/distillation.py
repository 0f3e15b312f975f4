"""One network of the original size from checkpoints of a run.

By distillation ("Distilled KF"), by averaging the weights themselves ("Averaged KF"), or trained
anew with a loss that is corrected for the noise that the run has met.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fmnlib.checkpoint import check_labels, checkpoint_path, load_tensors, save_tensors
from fmnlib.config import InputError, RunConfig, StudentConfig
from fmnlib.data import Batch, DataSet, load, sample_crop_flip
from fmnlib.fusion import Fusion
from fmnlib.losses import forward_corrected
from fmnlib.models import autocast, load_average, mix_probs
from fmnlib.noise import check_matrix
from fmnlib.parallel import join
from fmnlib.record import RunRecord
from fmnlib.recorder import load_or_create
from fmnlib.step import Criterion
from fmnlib.training import build_model, pick_device, predict, train

Teacher = Sequence[tuple[nn.Module, float]]  # networks, and weights of sum 1
Matrix = Float[np.ndarray, "classes classes"]


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of a teacher: a checkpoint of a run, and its weight in the mixture."""

    config: RunConfig
    folder: Path
    epoch: int
    weight: float


def members_of(config: RunConfig, folder: Path, fusion: Fusion) -> list[Member]:
    """The checkpoints of a run that have weight in a fusion."""
    chosen = fusion.weights.nonzero()[0].tolist()
    return [Member(config, folder, epoch, float(fusion.weights[epoch])) for epoch in chosen]


def student_config(
    config: RunConfig, name: str, members: Sequence[Member], **student: Any
) -> RunConfig:
    """The config of a student: the settings of a run, with the name and digest of a teacher.

    Only the final network of a student is kept; its loss is `soft_target_loss`.

    Args:
        config: The run whose settings, network included, the student takes.
        name: Short name of the teacher, such as kf.
        members: The teacher's networks.
        student: Other fields of `StudentConfig`.
    """
    parts = "".join(f"{m.config.id} {m.epoch} {m.weight:.9f}\n" for m in members)
    return config.keeping(
        config.epochs,
        loss="cross_entropy",
        loss_parameters=(),
        student=StudentConfig(teacher=_named(name, parts), **student),
    )


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

    The loss is `soft_target_loss`. The teacher predicts the same augmented view as the student;
    without augmentation it predicts every image once, and with `teacher_views` once for each of
    so many views.

    Args:
        config: The student, as `student_config` made it.
        members: The teacher's networks; their weights sum to 1.
        folder: The student's own folder.
        device: As in `train`.
        progress: Show a progress bar.
        deadline: As in `train`.

    Raises:
        InputError: If the teacher has no members, or their weights do not sum to 1.
    """
    _check_sum(members)
    student = config.student or StudentConfig()
    data = with_view_pool(config, load(config, join(pick_device(device))[1]))
    if (folder / "record.npz").exists():  # then the teacher's checkpoints may be gone
        check_labels(folder, data.labels.cpu().numpy())
        if (record := RunRecord.load(folder)).config == config:
            return record
    teacher = [(load_network(member, data), member.weight) for member in members]
    heaviest = max(members, key=lambda member: member.weight)
    return train(
        config,
        folder,
        device=device,
        data=data,
        criterion=teacher_criterion(config, data, teacher),
        initial=None if student.init == "scratch" else _weights(heaviest),
        progress=progress,
        deadline=deadline,
    )


def soft_target_loss(
    logits: Tensor, teacher_probs: Tensor, labels: Tensor, student: StudentConfig
) -> Tensor:
    """The loss of Hinton, Vinyals and Dean (2015), `[batch]`.

    With soft share a and temperature T,
    a T^2 CE(teacher^(1/T), softmax(z / T)) + (1 - a) CE(label, softmax(z)).

    With refined labels, the label is the class that the teacher predicts, so that noise in the
    given labels does not enter.

    Args:
        logits: The student's logits z, `[batch, classes]`.
        teacher_probs: The teacher's probabilities for the same images, `[batch, classes]`.
        labels: The given labels, `[batch]`.
        student: Gives T, a and which labels are used.

    >>> student = StudentConfig(temperature=1.0, soft_share=0.5)
    >>> logits, probs = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]])
    >>> round(soft_target_loss(logits, probs, torch.tensor([0]), student).item(), 4)  # ln 2
    0.6931
    """
    temperature, share = student.temperature, student.soft_share
    if student.labels == "refined":
        labels = teacher_probs.argmax(1)
    soft = F.softmax(teacher_probs.clamp_min(1e-12).log() / temperature, dim=1)
    soft_loss = temperature**2 * F.cross_entropy(logits / temperature, soft, reduction="none")
    return share * soft_loss + (1 - share) * F.cross_entropy(logits, labels, reduction="none")


def teacher_criterion(config: RunConfig, data: DataSet, teacher: Teacher) -> Criterion:
    """The loss of a student; if views repeat, the teacher's predictions are precomputed."""
    student = config.student or StudentConfig()
    in_advance = config.augment == "none" or data.view_pool is not None
    table = predict_views(config, data, teacher) if in_advance else None

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        if table is None:
            with autocast(config.precision, batch.images.device):
                probs = mix_probs(teacher, batch.images)
        else:
            probs = table[batch.view, batch.index]
        return soft_target_loss(logits, probs, data.labels[batch.index], student)

    return loss


def with_view_pool(config: RunConfig, data: DataSet) -> DataSet:
    """The data with the pool of views, drawn with the run's seed, that its student asks for."""
    views = 0 if config.student is None else config.student.teacher_views
    if not views or config.augment == "none":
        return data
    generator = torch.Generator(data.device).manual_seed(config.seed)
    samples, side = len(data.labels), data.shape[-1]
    pool = [sample_crop_flip(config.augment, side, samples, generator) for _ in range(views)]
    return dataclasses.replace(data, view_pool=torch.stack(pool))


def corrected_config(config: RunConfig, matrix: Matrix) -> RunConfig:
    """The config of a run whose loss is corrected for a noise matrix, named by its digest."""
    numbers = " ".join(f"{share:.6f}" for share in matrix.flat)
    student = StudentConfig(teacher=_named("glc", numbers))
    return dataclasses.replace(config, loss="cross_entropy", loss_parameters=(), student=student)


def train_corrected(
    config: RunConfig,
    members: Sequence[Member],
    folder: Path,
    *,
    matrix: Matrix,
    device: str = "auto",
    progress: bool = True,
    deadline: float = math.inf,
) -> RunRecord:
    """Train with `fmnlib.losses.forward_corrected` and return the record, of all epochs.

    With a matrix from `fmnlib.noise.estimated_matrix` this is the gold loss correction of
    Hendrycks et al. (2018), except that the trusted samples are not trained on.

    Row i of the matrix T `[classes, classes]` has the shares of the given labels in true class i.
    The config is from `corrected_config`; `members` is unused; the rest is as in `train`.

    Raises:
        InputError: If rows are not probabilities, or the matrix does not fit config or data.
    """
    if (expected := corrected_config(config, matrix)) != config:
        problem = f"the noise matrix is {expected.teacher} and the run {config.teacher or 'plain'}"
        raise InputError(f"{problem}; make the config with corrected_config")
    data = load(config, join(pick_device(device))[1])
    if matrix.shape != (data.classes, data.classes):
        shape, wanted = " x ".join(map(str, matrix.shape)), f"{data.classes} x {data.classes}"
        raise InputError(f"the noise matrix is {shape}; give {wanted}")
    check_matrix(matrix)
    noise = torch.tensor(matrix, dtype=torch.float32, device=data.device)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return forward_corrected(logits, data.labels[batch.index], noise)

    options: Any = {"progress": progress, "deadline": deadline}
    return train(config, folder, device=device, data=data, criterion=loss, **options)


def average(
    config: RunConfig, members: Sequence[Member], folder: Path, *, device: str = "auto"
) -> RunRecord:
    """Average the weights of `members` into one network, and record its predictions.

    BatchNorm's statistics are estimated again on the training images. The record has one epoch.
    """
    _check_sum(members)

    def make(data: DataSet) -> RunRecord:
        states = ((load_network(m, data).state_dict(), m.weight) for m in members)
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
        # Batches of one size: statistics of all batches count alike.
        parts = order.to(data.device).tensor_split(math.ceil(len(order) / 500))
        batches = data.batches(parts, "none", 0)
        images = (batch.images for batch in batches)  # shuffled: folders are sorted by class
        model = load_average(build_model(config, data), states, images)
        save_tensors(checkpoint_path(folder, 0), model.state_dict())
        logits = predict(model, data, data.eval_images, config.precision)
        probs = logits.softmax(1)[None].cpu().numpy()
        return RunRecord.from_arrays(probs, data.eval_labels.cpu().numpy())

    return load_or_create(config, folder, pick_device(device), make)


def load_network(member: Member, data: DataSet) -> nn.Module:
    """A member's network with its weights, in evaluation mode."""
    model = build_model(member.config, data)
    model.load_state_dict(_weights(member))
    return model.eval().requires_grad_(False)


def _named(name: str, content: str) -> str:
    return f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _weights(member: Member) -> dict[str, Tensor]:
    return load_tensors(checkpoint_path(member.folder, member.epoch))


def _check_sum(members: Sequence[Member]) -> None:
    total = sum(member.weight for member in members)
    if abs(total - 1) > 1e-6:
        count = f"{len(members)} networks"
        raise InputError(f"the weights of the teacher's {count} sum to {total:.6g}; make it 1")


def predict_views(config: RunConfig, data: DataSet, teacher: Teacher) -> Tensor:
    """The teacher's probabilities `[views, samples, classes]`."""
    views = []
    for transforms in [None] if data.view_pool is None else data.view_pool:
        probs = [
            weight * predict(net, data, data.images, config.precision, transforms).softmax(1)
            for net, weight in teacher
        ]
        views.append(torch.stack(probs).sum(0))
    return torch.stack(views)
