"""Training as scripts usually do it, to compare with; nothing here is made slow on purpose.

PIL images with torchvision's transforms, a `DataLoader`, float32, loss and accuracy by `.item()`
at every step, an evaluation after every epoch; on request `torch.save` and `np.save`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import measure
from fmnlib import RunConfig
from fmnlib.data import DataSet
from fmnlib.training import build_model

TEMPERATURE, SOFT_SHARE = 2.0, 0.9  # of the loss by which a student learns from its teacher


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory as torchvision's own data sets keep them."""

    def __init__(self, images: Tensor, labels: Tensor, steps: Sequence[Any]) -> None:
        self.data = images.cpu().permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.targets, self.transform = labels.tolist(), transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


@dataclass
class Script:
    """The usual script of a run; it may learn from weighted networks, and save each epoch."""

    config: RunConfig
    data: DataSet
    workers: int = 0
    teacher: Sequence[tuple[nn.Module, float]] = ()
    save: Path | None = None

    def __post_init__(self) -> None:
        config, data, side = self.config, self.data, self.data.shape[-1]
        mean, std = data.mean.tolist(), data.std.tolist()
        plain = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        crop, flip = transforms.RandomCrop(side, side // 8), transforms.RandomHorizontalFlip()
        moves = {"none": [], "crop": [crop], "crop_flip": [crop, flip]}[config.augment]
        shown = Images(data.images, data.labels, moves + plain)
        tested = Images(data.eval_images, data.eval_labels, plain)
        told: dict[str, Any] = {"num_workers": self.workers}
        told["pin_memory"] = data.device.type == "cuda"
        self.train_loader = DataLoader(shown, config.batch_size, shuffle=True, **told)
        self.test_loader = DataLoader(tested, config.batch_size, **told)
        self.model = build_model(config, data).to(memory_format=torch.contiguous_format)
        told = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), config.lr, nesterov=True, **told)
        self.scheduler = CosineAnnealingLR(self.optimizer, config.epochs)

    def epoch(self) -> None:
        """Train on all images, evaluate, and save if that is wanted."""
        self._pass(self.train_loader)
        with torch.no_grad():
            probs = np.concatenate(self._pass(self.test_loader))
        if self.save is not None:
            path = self.save / f"{self.scheduler.last_epoch}.pt"
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, path)
            np.save(path.with_suffix(".npy"), probs)
        self.scheduler.step()

    def _pass(self, loader: DataLoader[tuple[Tensor, int]]) -> list[np.ndarray]:
        """Go through all images once; their probabilities, where nothing is learned."""
        self.model.train(training := torch.is_grad_enabled())
        total, right, probs = 0.0, 0.0, []
        for images, labels in loader:
            images, labels = images.to(self.data.device), labels.to(self.data.device)
            logits = self.model(images)
            right += (logits.argmax(1) == labels).sum().item()
            if not training:
                probs.append(logits.softmax(1).cpu().numpy())
                continue
            loss = self._loss(images, logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(labels)
        return probs

    def _loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        if not self.teacher:
            return loss
        with torch.no_grad():
            probs = sum(weight * net(images).softmax(1) for net, weight in self.teacher)
            soft = (probs.clamp_min(1e-12).log() / TEMPERATURE).softmax(1)
        soft_loss = TEMPERATURE**2 * F.cross_entropy(logits / TEMPERATURE, soft)
        return SOFT_SHARE * soft_loss + (1 - SOFT_SHARE) * loss


def fastest_workers(config: RunConfig, data: DataSet) -> int:
    """With how many workers the script is fastest."""
    tried = {0, 2, (os.cpu_count() or 1) // 2}
    return min(tried, key=lambda n: measure(Script(config, data, n).epoch, once=True).median)
