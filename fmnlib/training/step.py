"""One step of training: forward, loss, backward, update; on a GPU replayed as a CUDA graph.

At batches of 128 small images a GPU computes a step faster than Python can ask for it. A step that
was captured once is asked for in one call.
"""

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fmnlib.config import RunConfig
from fmnlib.training.dataset import Data
from fmnlib.training.models import arithmetic
from fmnlib.training.parallel import World
from fmnlib.training.regularize import mix, parameter_groups

__all__ = ["Criterion", "Parts", "Step", "make_optimizer"]

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss per sample from the logits, the images that gave them and the samples' indices."""

EAGER_STEPS = 3
"""Steps of a batch size before its capture, in which libraries choose their kernels."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What changes while a run trains; `ema` is the model itself where no average is kept."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module


class Step:
    """Steps of one run, and what they saw of each training sample in the epoch at hand.

    Args:
        config: The run.
        data: Its data.
        parts: What the steps change.
        criterion: Loss per sample.
        world: The processes that share each batch.
        graphs: Replay steps as CUDA graphs, on a GPU.

    Attributes:
        losses: Loss of each training sample when it was last seen, `[samples]`.
        right: Whether it was given its label, `[samples]`.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        parts: Parts,
        criterion: Criterion,
        world: World,
        graphs: bool,
    ) -> None:
        self.config, self.data, self.parts, self.criterion = config, data, parts, criterion
        self.world, self._net = world, world.wrap(parts.model)
        self._mixes = config.mixup > 0 or config.cutmix > 0
        # How images mix is drawn on the host, and a graph would keep the first draw.
        self._graphs = graphs and data.device.type == "cuda" and world.size == 1
        self._graphs = self._graphs and not self._mixes
        self._rng = np.random.default_rng(0)
        self._seen: dict[int, int] = {}
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.losses = torch.zeros(len(data.labels), device=data.device)
        self.right = torch.zeros_like(self.losses, dtype=torch.bool)

    def begin(self, seed: int) -> None:
        """Begin an epoch, whose randomness comes from a seed."""
        torch.manual_seed(seed)  # dropout and the like
        self._rng = np.random.default_rng((seed, self.world.rank))
        self.losses.zero_()
        self.right.zero_()
        self.parts.model.train()

    def __call__(self, images: Tensor, index: Tensor, lr: float) -> None:
        """Take one step on this process's part of a batch, as `DataSet.views` gives it."""
        for group in self.parts.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        size = len(index)
        if size in self._captured:
            self._replay(images, index)
        elif self._graphs and self._seen.get(size, 0) >= EAGER_STEPS:
            self._capture(images, index)
        else:
            self._seen[size] = self._seen.get(size, 0) + 1
            take = self._take_aside if self._graphs else self._take
            take(images, index)

    def _take(self, images: Tensor, index: Tensor) -> None:
        config, parts = self.config, self.parts
        if self._mixes:
            images, partner, lam = mix(images, config.mixup, config.cutmix, self._rng)
        with arithmetic(config.precision, images.device):
            logits = self._net(images).float()
        loss = self.criterion(logits, images, index)
        if self._mixes:
            loss = lam * loss + (1 - lam) * self.criterion(logits, images, index[partner])
        parts.optimizer.zero_grad()
        self.mean(loss).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(parts.model.parameters(), config.clip_norm, foreach=True)
        parts.optimizer.step()
        if parts.ema is not parts.model:
            _update_ema(parts.ema, parts.model, config.ema)
        self.losses[index] = loss.detach()
        self.right[index] = logits.detach().argmax(1) == self.data.labels[index]

    def mean(self, loss: Tensor) -> Tensor:
        """The mean over the whole batch, whose parts may differ in size by one."""
        if self.world.size == 1:
            return loss.mean()
        count = self.world.gather(torch.tensor(float(len(loss)), device=loss.device))
        return loss.sum() * self.world.size / count  # the gradients will be averaged

    def _take_aside(self, images: Tensor, index: Tensor) -> None:
        """Take a step on another stream than the usual one, as a step before a capture has to."""
        usual, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(usual)
        with torch.cuda.stream(aside):
            self._take(images, index)
        usual.wait_stream(aside)

    def _replay(self, images: Tensor, index: Tensor) -> None:
        graph, held_images, held_index = self._captured[len(index)]
        held_images.copy_(images)
        held_index.copy_(index)
        graph.replay()

    def _capture(self, images: Tensor, index: Tensor) -> None:
        """Capture the step for batches of this size, then take it."""
        held = images.clone(memory_format=torch.preserve_format), index.clone()
        graph = torch.cuda.CUDAGraph()
        self.parts.optimizer.zero_grad(set_to_none=True)
        usual, reason = torch.cuda.current_stream(), ""
        try:
            # The last epoch may be on its way to the disk in another thread.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._take(*held)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0] or "unknown"
        if reason:  # after the error, which holds what the failed step allocated, is let go
            warnings.warn(f"steps cannot be captured, going on without ({reason})", stacklevel=2)
            torch.cuda.set_stream(usual)
            self.parts.optimizer.zero_grad(set_to_none=True)
            self._graphs = False
            self._take(images, index)
            return
        self._captured[len(index)] = graph, *held
        graph.replay()


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a run, fused; on a GPU with its learning rate on the device."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    lr = torch.tensor(config.lr, device=device) if cuda else config.lr
    groups = parameter_groups(model, config.weight_decay, config.no_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr, fused=True, capturable=cuda)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr, config.momentum, nesterov=nesterov, fused=True)


@torch.no_grad()
def _update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model; running statistics move too, counts are copied."""
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    averages, values = zip(*floating, strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)
