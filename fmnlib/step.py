"""One step of training: forward, loss, backward, update; on a GPU replayed as a CUDA graph.

At batches of 128 small images a GPU computes a step faster than Python can launch it. A step that
was captured once is launched in one call.
"""

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fmnlib.config import RunConfig
from fmnlib.data import Batch, DataSet
from fmnlib.losses import Memory
from fmnlib.models import autocast
from fmnlib.parallel import World

Criterion = Callable[[Tensor, Batch], Tensor]
"""Loss per sample from the logits and the batch that gave them."""

EAGER_STEPS = 3  # of a batch size before its capture: libraries choose their kernels


@dataclasses.dataclass(frozen=True)
class Parts:
    """What changes while a run trains; without an average `ema` is the model itself."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module
    memory: Memory | None = None


class Step:
    """Steps of one run, and the losses of each training sample in the current epoch.

    Args:
        config: The run.
        data: Its data.
        parts: What the steps change.
        criterion: Loss per sample.
        world: The processes that share each batch.
        graphs: Replay steps as CUDA graphs, on a GPU.

    Attributes:
        losses: Loss of each training sample when it was last trained on, `[samples]`;
            with a loss made for label noise its cross-entropy, so that runs compare.
        right: Whether it was predicted as its label says, `[samples]`.
    """

    def __init__(
        self,
        config: RunConfig,
        data: DataSet,
        parts: Parts,
        criterion: Criterion,
        world: World,
        graphs: bool,
    ) -> None:
        self.config, self.data, self.parts, self.criterion = config, data, parts, criterion
        self.world, self._net = world, world.data_parallel(parts.model)
        self._graphs = graphs and data.device.type == "cuda" and world.size == 1
        self._eager: dict[int, int] = {}
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self.losses = torch.zeros(len(data.labels), device=data.device)
        self.right = torch.zeros_like(self.losses, dtype=torch.bool)

    def begin(self, seed: int) -> None:
        """Begin an epoch, whose randomness comes from a seed."""
        torch.manual_seed(seed)  # dropout and the like
        self.losses.zero_()
        self.right.zero_()
        self.parts.model.train()

    def __call__(self, batch: Batch, lr: float) -> None:
        """Take one step on this process's shard of a batch."""
        for group in self.parts.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        size = len(batch.index)
        if size in self._captured:
            self._replay(batch)
        elif self._graphs and self._eager.get(size, 0) >= EAGER_STEPS:
            self._capture(batch)
        else:
            self._eager[size] = self._eager.get(size, 0) + 1
            take = self._take_aside if self._graphs else self._take
            take(batch)

    def _take(self, batch: Batch) -> None:
        config, parts = self.config, self.parts
        with autocast(config.precision, batch.images.device):
            logits = self._net(batch.images).float()
        loss = self.criterion(logits, batch)
        parts.optimizer.zero_grad()
        self.mean(loss).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(parts.model.parameters(), config.clip_norm, foreach=True)
        parts.optimizer.step()
        if parts.ema is not parts.model:
            _update_ema(parts.ema, parts.model, config.ema)
        if config.loss != "cross_entropy":
            loss = F.cross_entropy(logits, self.data.labels[batch.index], reduction="none")
        self.losses[batch.index] = loss.detach()
        self.right[batch.index] = logits.detach().argmax(1) == self.data.labels[batch.index]

    def mean(self, loss: Tensor) -> Tensor:
        """The mean over the whole batch, whose shards may differ in size by one."""
        if self.world.size == 1:
            return loss.mean()
        count = self.world.all_reduce(torch.full((), float(len(loss)), device=loss.device))
        return loss.sum() * self.world.size / count  # gradients are averaged over processes

    def _take_aside(self, batch: Batch) -> None:
        """Take a step on a side stream, as a step before a capture has to."""
        usual, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(usual)
        with torch.cuda.stream(aside):
            self._take(batch)
        usual.wait_stream(aside)

    def _replay(self, batch: Batch) -> None:
        graph, static = self._captured[len(batch.index)]
        static.images.copy_(batch.images)
        static.index.copy_(batch.index)
        static.view.copy_(batch.view)
        graph.replay()

    def _capture(self, batch: Batch) -> None:
        """Capture the step for batches of this size, then take it."""
        images = batch.images.clone(memory_format=torch.preserve_format)
        static = Batch(images, batch.index.clone(), batch.view.clone())
        graph = torch.cuda.CUDAGraph()
        self.parts.optimizer.zero_grad(set_to_none=True)
        usual, reason = torch.cuda.current_stream(), ""
        try:
            # The last epoch may be on its way to the disk in another thread.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._take(static)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0] or "unknown"
        if reason:  # after the error, which holds what the failed step allocated, is freed
            warnings.warn(f"steps cannot be captured, going on without ({reason})", stacklevel=2)
            torch.cuda.set_stream(usual)
            self.parts.optimizer.zero_grad(set_to_none=True)
            self._graphs = False
            self._take(batch)
            return
        self._captured[len(batch.index)] = graph, static
        graph.replay()


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a run, fused; on a GPU with its learning rate on the device."""
    device = next(model.parameters()).device
    cuda, decay = device.type == "cuda", config.weight_decay
    lr = torch.tensor(config.lr, device=device) if cuda else config.lr
    parameters = model.parameters()
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True, capturable=cuda)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(
        parameters, lr, config.momentum, weight_decay=decay, nesterov=nesterov, fused=True
    )


@torch.no_grad()
def _update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model; running statistics move too, counts are copied.

    `AveragedModel` of torch would wait for the GPU in every step, and no graph can hold that.
    """
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    averages, values = map(list, zip(*floating, strict=True))
    get_ema_multi_avg_fn(decay)(averages, values, 0)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)
