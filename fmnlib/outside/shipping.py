"""One network to ship from a fusion of checkpoint files: averaged weights, or a student.

The networks, the images and the files are the user's; `fmnlib.training.distill` does the same for
runs that this library trained.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fmnlib.config import InputError
from fmnlib.fusion import Fusion
from fmnlib.outside.checkpoints import Maker, fit, read_state
from fmnlib.outside.pictures import Pictures, View
from fmnlib.training.models import average_weights, mix_probs, reestimate_batchnorm

__all__ = ["averaged", "distilled"]


def averaged(
    make: Maker,
    paths: Sequence[Path],
    fusion: Fusion,
    images: UInt8[Tensor, "samples channels side side"],
    view: View,
    *,
    device: torch.device,
) -> nn.Module:
    """The network whose weights are the fusion's mean of the checkpoints' ("Averaged KF").

    Args:
        make: Makes the network.
        paths: The checkpoints, one a weight of the fusion.
        fusion: Weights over the checkpoints.
        images: BatchNorm's statistics, if there are any, are estimated anew on them, since those
            of averaged weights are no average.
        view: How the network sees them.
        device: Where to compute.
    """
    states = (
        (fit(make(), read_state(path)).state_dict(), w) for path, w in _members(paths, fusion)
    )
    model = make().to(device)
    model.load_state_dict(average_weights(states))
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        parts = tqdm(images.split(100), "estimating BatchNorm", unit="batch")
        reestimate_batchnorm(model, (view.normalize(part.to(device)) for part in parts))
    return model.eval()


def distilled(
    make: Maker,
    paths: Sequence[Path],
    fusion: Fusion,
    train: Pictures,
    view: View,
    *,
    epochs: int,
    lr: float,
    temperature: float = 2.0,
    soft_share: float = 0.9,
    batch: int = 64,
    seed: int = 0,
    device: torch.device,
) -> nn.Module:
    """A student that learns to say what the fusion says about the training images.

    It starts from the fusion's heaviest checkpoint. The loss is that of `fmnlib.training.distill`,
    for SGD with Nesterov momentum and a cosine to 0. Images are not augmented: the fusion's
    answers are computed once.

    Args:
        make: Makes the network.
        paths: The checkpoints, one a weight of the fusion.
        fusion: Weights over the checkpoints.
        train: Training images; their labels may be partly wrong.
        view: How the networks see them.
        epochs: Passes over the images.
        lr: Peak learning rate.
        temperature: Softens teacher and student.
        soft_share: Weight of the teacher's term; the labels' term has the rest.
        batch: Images a step.
        seed: Draws the order.
        device: Where to compute.
    """
    members = _members(paths, fusion)
    teacher = [(fit(make(), read_state(path)).to(device), weight) for path, weight in members]
    heaviest = max(members, key=lambda member: member[1])[0]
    student = fit(make(), read_state(heaviest)).to(device).train()
    parts = tqdm(train.images.split(100), "asking the fusion", unit="batch")
    answers = torch.cat([mix_probs(teacher, view.normalize(p.to(device))) for p in parts])
    targets = (answers.clamp_min(1e-12).log() / temperature).softmax(1)
    optimizer = torch.optim.SGD(student.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    draw = torch.Generator().manual_seed(seed)
    steps = max(1, round(len(train.labels) / batch))  # equal parts: no tail of one image
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in (show := tqdm(range(epochs), "distilling", unit="epoch")):
        for index in torch.randperm(len(train.labels), generator=draw).tensor_split(steps):
            logits = student(view.normalize(train.images[index].to(device)))
            soft = F.cross_entropy(logits / temperature, targets[index.to(device)])
            hard = F.cross_entropy(logits, train.labels[index].to(device))
            loss = soft_share * temperature**2 * soft + (1 - soft_share) * hard
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        show.set_postfix(loss=f"{loss.item():.3f}")
        if not loss.isfinite():
            raise InputError(f"the student's loss is not finite; lower lr, now {lr}")
    return student.eval()


def _members(paths: Sequence[Path], fusion: Fusion) -> list[tuple[Path, float]]:
    return [(paths[i], float(fusion.weights[i])) for i in fusion.weights.nonzero()[0].tolist()]
