"""Losses for training with label noise, as functions of one batch, and the memory of some.

Each returns a loss per sample, `[batch]`, from logits with p = softmax(logits) and given labels y.
Three have a memory, a row of probabilities for each training sample: they return the updated rows,
and `sample_losses` stores them. A number that changes between epochs is a tensor on the device,
because a CUDA graph replays a step with the Python numbers of its capture.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from fmnlib.config import LOSSES, RunConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a loss remembers of the training samples; both tensors are updated in place."""

    #: Probabilities `[samples, classes]`, at first 0 (elr) or the labels (sat, ps_kd)
    targets: Tensor
    share: Tensor  #: Weight of predictions in the epoch's targets, a scalar


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """(1 - p_y^q) / q: cross-entropy for q towards 0, mean absolute error at 1.

    Zhang and Sabuncu (2018), without their truncation.

    >>> generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), q=1.0)
    tensor([0.5000])
    """
    return -torch.expm1(-q * F.cross_entropy(logits, labels, reduction="none")) / q


def symmetric_cross_entropy(logits: Tensor, labels: Tensor, a: float, b: float) -> Tensor:
    """Cross-entropy in both directions: a CE(y, p) + b CE(p, y), where log 0 counts as -4.

    So CE(p, y) is 4 (1 - p_y). Wang et al. (2019). Public code clamps the labels at 1e-4 instead:
    log 0 is -9.21 there, and the same b has 2.3 times the effect.

    >>> symmetric_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), a=0.0, b=1.0)
    tensor([2.])
    """
    forward = F.cross_entropy(logits, labels, reduction="none")
    return a * forward - 4 * b * torch.expm1(-forward)


def early_learning(
    logits: Tensor, labels: Tensor, targets: Tensor, strength: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Early-learning regularisation: CE(y, p) + strength log(1 - <t, p>), and the new targets t.

    t <- momentum t + (1 - momentum) p / sum p, without a gradient; outside of CE p is clamped to
    1e-4 and 1 - 1e-4. Liu et al. (2020), and their code.

    >>> start = torch.zeros(1, 2)  # ln 2 + ln(1 - 0.5 * 0.5)
    >>> early_learning(start, torch.tensor([0]), start, strength=1.0, momentum=0.5)
    (tensor([0.4055]), tensor([[0.2500, 0.2500]]))
    """
    probs = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    fixed = probs.detach()
    targets = momentum * targets + (1 - momentum) * fixed / fixed.sum(1, keepdim=True)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses + strength * torch.log1p(-(targets * probs).sum(1)), targets


def self_adaptive(logits: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Self-adaptive training: w CE(t, p), and the new targets t.

    t <- (1 - share) t + share p, without a gradient, from the labels; w is max t over its mean in
    the batch. While share is 0, it is plain cross-entropy. Huang et al. (2020) and code.

    >>> self_adaptive(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor(0.5))
    (tensor([0.6931]), tensor([[0.7500, 0.2500]]))
    """
    targets = targets + share * (logits.detach().softmax(1) - targets)
    weights = targets.amax(1) / targets.amax(1).mean()
    return weights * F.cross_entropy(logits, targets, reduction="none"), targets


def progressive_self_distillation(
    logits: Tensor, labels: Tensor, targets: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """PS-KD: CE((1 - share) y + share t, p), and the new targets p, which the next epoch sees.

    In epoch e of E, from 0, share is a (e + 1) / E. Kim et al. (2021), and their code.

    >>> half, before = torch.tensor(0.5), torch.tensor([[0.0, 1.0]])
    >>> progressive_self_distillation(torch.zeros(1, 2), torch.tensor([0]), before, half)
    (tensor([0.6931]), tensor([[0.5000, 0.5000]]))
    """
    given = F.cross_entropy(logits, labels, reduction="none")
    remembered = F.cross_entropy(logits, targets, reduction="none")
    return (1 - share) * given + share * remembered, logits.detach().softmax(1)


def forward_corrected(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """-log sum_i T_iy p_i: cross-entropy under label noise; T_ij is P(given j | true class i).

    Patrini et al. (2017). Entries of T below 1e-12 count as 1e-12.

    >>> matrix = torch.tensor([[0.7, 0.3], [0.1, 0.9]])  # -log(0.5 * 0.7 + 0.5 * 0.1)
    >>> forward_corrected(torch.zeros(1, 2), torch.tensor([0]), matrix)
    tensor([0.9163])
    """
    given = matrix.clamp_min(1e-12).log().T[labels]
    return -torch.logsumexp(logits.log_softmax(1) + given, dim=1)


def parameters(config: RunConfig) -> tuple[float, ...]:
    """The parameters of a run's loss, in the order of `LOSSES`.

    >>> parameters(RunConfig(loss="elr"))
    (3.0, 0.7)
    """
    return config.loss_parameters or tuple(value for value, _, _ in LOSSES[config.loss].values())


def new_memory(config: RunConfig, labels: Tensor, classes: int) -> Memory | None:
    """The memory of a run's loss before the first epoch; None for a loss without one."""
    if config.loss not in ("elr", "sat", "ps_kd"):
        return None
    given = labels[:, None] == torch.arange(classes, device=labels.device)
    targets = given.float() * (config.loss != "elr")
    return Memory(targets, torch.zeros((), device=labels.device))


def begin_epoch(config: RunConfig, memory: Memory, epoch: int) -> None:
    """Set `memory.share` for an epoch, which counts from 0."""
    if config.loss == "sat":
        momentum, start = parameters(config)
        memory.share.fill_(1 - momentum if epoch >= start * config.epochs else 0.0)
    if config.loss == "ps_kd":
        memory.share.fill_(parameters(config)[0] * (epoch + 1) / config.epochs)


def sample_losses(
    config: RunConfig, logits: Tensor, labels: Tensor, index: Tensor, memory: Memory | None
) -> Tensor:
    """The losses `[batch]` of the training samples `index`, by `config.loss`; updates memory."""
    values = parameters(config)
    if config.loss == "gce":
        return generalized_cross_entropy(logits, labels, *values)
    if config.loss == "sce":
        return symmetric_cross_entropy(logits, labels, *values)
    if memory is None:
        smoothing = config.label_smoothing
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    targets = memory.targets[index]
    if config.loss == "elr":
        losses, targets = early_learning(logits, labels, targets, *values)
    elif config.loss == "sat":
        losses, targets = self_adaptive(logits, targets, memory.share)
    else:
        losses, targets = progressive_self_distillation(logits, labels, targets, memory.share)
    memory.targets[index] = targets
    return losses
