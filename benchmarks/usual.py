"""Training as scripts usually do it, to compare with; nothing here is made slow on purpose.

A `Dataset` of PIL images with torchvision's transforms, a `DataLoader`, float32, loss and accuracy
by `.item()` at every step, an evaluation after every epoch; on request `torch.save` of network and
optimiser and `np.save` of the probabilities.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fmnlib import RunConfig
from fmnlib.data import DataSet
from fmnlib.training import build_model

__all__ = ["epochs"]


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory as torchvision's own data sets keep them."""

    def __init__(self, images: Tensor, labels: Tensor, transform: transforms.Compose) -> None:
        self.data = images.cpu().permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.targets, self.transform = labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def epochs(
    config: RunConfig,
    data: DataSet,
    count: int,
    workers: int,
    *,
    samples: int | None = None,
    teacher: Sequence[tuple[nn.Module, float]] = (),
    save: Path | None = None,
) -> list[float]:
    """Seconds of each epoch of training and evaluation.

    Args:
        config: What to train.
        data: Where the images come from.
        count: How many epochs.
        workers: Of each `DataLoader`.
        samples: Train on so many images only, and evaluate on as large a share.
        teacher: Networks, with their weights, whose mean prediction is learned as well.
        save: Folder for checkpoints and probabilities, if they are wanted.
    """
    samples = samples or len(data.labels)
    evaluated = max(1, round(len(data.eval_labels) * samples / len(data.labels)))
    usual = [
        transforms.ToTensor(),
        transforms.Normalize(data.mean.tolist(), data.std.tolist()),
    ]
    side, pinned = data.shape[-1], data.device.type == "cuda"
    moves = {
        "none": [],
        "crop": [transforms.RandomCrop(side, padding=side // 8)],
        "crop_flip": [
            transforms.RandomCrop(side, padding=side // 8),
            transforms.RandomHorizontalFlip(),
        ],
    }[config.augment]
    train_set = Images(
        data.images[:samples], data.labels[:samples], transforms.Compose([*moves, *usual])
    )
    test_set = Images(
        data.eval_images[:evaluated], data.eval_labels[:evaluated], transforms.Compose(usual)
    )
    train_loader = DataLoader(
        train_set, config.batch_size, shuffle=True, num_workers=workers, pin_memory=pinned
    )
    test_loader = DataLoader(test_set, config.batch_size, num_workers=workers, pin_memory=pinned)
    model = build_model(config, data).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, 0, config.weight_decay, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    seconds = []
    for epoch in range(count):
        start = time.perf_counter()
        _train(model, train_loader, optimizer, data.device, teacher, config)
        _, probs = _evaluate(model, test_loader, data.device)
        scheduler.step()
        if save is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, save / f"{epoch}.pt")
            np.save(save / f"{epoch}.npy", probs)
        seconds.append(time.perf_counter() - start)
    return seconds


def _train(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, int]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    teacher: Sequence[tuple[nn.Module, float]],
    config: RunConfig,
) -> tuple[float, float]:
    model.train()
    total_loss, correct, temperature = 0.0, 0, config.temperature
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        if teacher:
            with torch.no_grad():
                probs = sum(weight * net(images).softmax(1) for net, weight in teacher)
                soft = (probs.clamp_min(1e-12).log() / temperature).softmax(1)
            soft_loss = temperature**2 * F.cross_entropy(logits / temperature, soft)
            loss = config.soft_share * soft_loss + (1 - config.soft_share) * loss
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
    return total_loss / len(loader.dataset), correct / len(loader.dataset)


@torch.no_grad()
def _evaluate(
    model: nn.Module, loader: DataLoader[tuple[Tensor, int]], device: torch.device
) -> tuple[float, np.ndarray]:
    model.eval()
    correct, probs = 0, []
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        correct += (logits.argmax(1) == labels).sum().item()
        probs.append(logits.softmax(1).cpu().numpy())
    return correct / len(loader.dataset), np.concatenate(probs)
