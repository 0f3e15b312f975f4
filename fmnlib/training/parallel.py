"""One run on several processes: started by torchrun, each trains on its part of every batch."""

import dataclasses
import os
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from fmnlib.config import InputError

__all__ = ["ALONE", "World", "join", "shared_batchnorm"]


@dataclasses.dataclass(frozen=True)
class World:
    """The processes that train one run together; one process alone is a world of size 1."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def part(self, index: Tensor) -> Tensor:
        """This process's part of a batch."""
        return index.tensor_split(self.size)[self.rank]

    def gather(self, filled: Tensor) -> Tensor:
        """Sum, in place, a tensor of which each process filled its own part, zero elsewhere."""
        if self.size > 1:
            distributed.all_reduce(filled)
        return filled

    def agree(self, value: float) -> float:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        told = [value]
        distributed.broadcast_object_list(told)
        return told[0]

    def meet(self) -> None:
        """Wait for each other."""
        if self.size > 1:
            distributed.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)


ALONE = World()
"""One process."""


def join(device: torch.device) -> tuple[World, torch.device]:
    """Meet the other processes that torchrun started, if any; this process and its device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are of the current device
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # One of them may wait long for its turn at the run's folder.
        distributed.init_process_group(backend, timeout=timedelta(days=1))
    return World(distributed.get_rank(), size), device


def shared_batchnorm(model: nn.Module, world: World) -> nn.Module:
    """The network with BatchNorm over the whole batch instead of each process's part of it."""
    if world.size == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            shared = _BatchNorm(module.num_features, module.eps, module.momentum or 0.1)
            shared.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), child, shared)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(f"{type(module).__name__} is not shared between processes on a CPU")
    return model


class _BatchNorm(nn.BatchNorm2d):
    """On CPUs, where torch's SyncBatchNorm does not run."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        input = input.float()  # in half precision a mean of squares loses the variance
        count = torch.tensor(float(input.numel() // input.shape[1]), device=input.device)
        sums = torch.cat([input.sum((0, 2, 3)), input.square().sum((0, 2, 3)), count[None]])
        total: Tensor = all_reduce(sums)
        mean, square = (total[:-1] / total[-1]).chunk(2)
        var = (square - mean.square()).clamp_min(0)
        self._follow(mean.detach(), var.detach(), total[-1].detach())
        scale = torch.rsqrt(var + self.eps) * self.weight
        return input * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics, the variance with Bessel's correction as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum or 0.1)
        self.running_var.lerp_(var * count / (count - 1), self.momentum or 0.1)
