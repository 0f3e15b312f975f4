"""One step of training: forward, loss, backward, update; on a GPU replayed as a CUDA graph."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fmnlib.config import RunConfig
from fmnlib.data import Batch, DataSet
from fmnlib.graph import Graphs
from fmnlib.losses import Memory
from fmnlib.models import autocast, number_format
from fmnlib.parallel import World

Criterion = Callable[[Tensor, Batch], Tensor]
"""Loss per sample from the logits and the batch that gave them."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Everything that training changes; without a moving average, `ema` is the model itself."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module
    scaler: torch.amp.GradScaler
    memory: Memory | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training changes, by name; no copies."""
        tensors, networks = dict[str, Tensor](), {"model": self.model}
        networks |= {"ema": self.ema} if self.ema is not self.model else {}
        for part, network in networks.items():
            state = network.state_dict()
            tensors |= {f"{part}.{name}": value for name, value in state.items()}
            for name, value in network.named_buffers():
                if name not in state:  # a buffer that is not persistent
                    tensors[f"hidden.{part}.{name}"] = value
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        if self.memory is not None:
            tensors["loss.targets"] = self.memory.targets
        names = ("_scale", "_growth_tracker") if self.scaler.is_enabled() else ()
        return tensors | {f"scaler.{name}": getattr(self.scaler, name) for name in names}


class Step:
    """The training step of one run; with `graphs` it is replayed as a CUDA graph on a GPU.

    Attributes:
        losses: Loss of each training sample in its last step, `[samples]`; for losses made
            for label noise the cross-entropy instead, so that runs can be compared.
        right: Whether each training sample was predicted as its label then, `[samples]`.
    """

    def __init__(
        self,
        config: RunConfig,
        data: DataSet,
        parts: TrainingState,
        criterion: Criterion,
        world: World,
        graphs: bool,
    ) -> None:
        self.config, self.data, self.parts, self.criterion = config, data, parts, criterion
        self.world, self._net = world, world.data_parallel(parts.model)
        self.losses = torch.zeros(len(data.labels), device=data.device)
        self.right = torch.zeros_like(self.losses, dtype=torch.bool)
        graphs = graphs and data.device.type == "cuda" and world.size == 1
        self._graphs = Graphs(self._take, self._state) if graphs else None

    def begin(self, seed: int) -> None:
        """Begin an epoch, whose randomness comes from a seed."""
        torch.manual_seed(seed)  # dropout and the like
        self.losses.zero_()
        self.right.zero_()
        self.parts.model.train()

    def __call__(self, batch: Batch, lr: float) -> None:
        """Take one step on this process's shard of a batch."""
        take: Callable[..., None] = self._graphs or self._take
        rate = torch.full((), lr, device=batch.images.device) if self._graphs else lr
        take(batch.images, batch.index, batch.view, rate)

    def close(self) -> None:
        """Release the CUDA graphs and their memory."""
        self._graphs = None

    def _take(self, images: Tensor, index: Tensor, view: Tensor, lr: float | Tensor) -> None:
        config, parts, scaler = self.config, self.parts, self.parts.scaler
        for group in parts.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        with autocast(config.precision, images.device):
            outputs = self._net(images)  # of GoogLeNet and Inception a tuple, with more heads
            logits = getattr(outputs, "logits", outputs).float()
        loss = self.criterion(logits, Batch(images, index, view))
        parts.optimizer.zero_grad()
        scaler.scale(self.mean(loss)).backward()
        if config.clip_norm:
            scaler.unscale_(parts.optimizer)
            nn.utils.clip_grad_norm_(parts.model.parameters(), config.clip_norm, foreach=True)
        scaler.step(parts.optimizer)
        scaler.update()
        if parts.ema is not parts.model:
            _update_ema(parts.ema, parts.model, config.ema)
        if config.loss != "cross_entropy":
            loss = F.cross_entropy(logits, self.data.labels[index], reduction="none")
        self.losses[index] = loss.detach()
        self.right[index] = logits.detach().argmax(1) == self.data.labels[index]

    def _state(self) -> dict[str, Tensor]:
        return self.parts.tensors() | {"step.losses": self.losses, "step.right": self.right}

    def mean(self, loss: Tensor) -> Tensor:
        """The mean over the whole batch, whose shards may differ in size by one."""
        if self.world.size == 1:
            return loss.mean()
        count = self.world.all_reduce(torch.full((), float(len(loss)), device=loss.device))
        return loss.sum() * self.world.size / count  # gradients are averaged over processes


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a run, fused; on a GPU with its learning rate on the device."""
    device = next(model.parameters()).device
    cuda, decay = device.type == "cuda", config.weight_decay
    lr = torch.tensor(config.lr, device=device) if cuda else config.lr
    parameters = model.parameters()
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True, capturable=cuda)
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(
        parameters, lr, config.momentum, weight_decay=decay, nesterov=nesterov, fused=True
    )
    if config.momentum and number_format(config.precision, device) == torch.float16:
        for parameter in model.parameters():  # an overflow in the first step would leave it unset
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(config: RunConfig, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler of a run: against underflow in float16, disabled in other formats."""
    half = number_format(config.precision, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    scaler.scale(torch.zeros((), device=device))  # the first call allocates its state
    return scaler


@torch.no_grad()
def _update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Update the moving average; it includes BatchNorm's statistics, while counters are copied.

    Torch's `AveragedModel` synchronises with the GPU in every step, which no CUDA graph allows.
    """
    averaged, current = ([*net.parameters(), *net.buffers()] for net in (ema, model))
    pairs = list(zip(averaged, current, strict=True))  # weights that two layers share come once
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    averages, values = map(list, zip(*floating, strict=True))
    get_ema_multi_avg_fn(decay)(averages, values, 0)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)
