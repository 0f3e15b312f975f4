"""One run on several processes: started by torchrun, each trains on its shard of every batch."""

import dataclasses
import os
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from fmnlib.config import InputError


@dataclasses.dataclass(frozen=True)
class World:
    """The processes that train one run together; one process alone is a world of size 1."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def shard(self, index: Tensor) -> Tensor:
        """This process's part of a batch."""
        return index.tensor_split(self.size)[self.rank]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, value: float) -> float:
        """The value of the first process, on every process."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            distributed.barrier()

    def data_parallel(self, model: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model


SINGLE_PROCESS = World()


def join(device: torch.device) -> tuple[World, torch.device]:
    """Join the processes that torchrun started, if any; return the world and this one's device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SINGLE_PROCESS, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        # The first process may wait long for the lock of the run's folder, the others for it.
        distributed.init_process_group(backend, timeout=timedelta(days=1), device_id=device_id)
    return World(distributed.get_rank(), size), device


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a network normalises by statistics of batches."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def synchronize_batchnorm(model: nn.Module, world: World) -> nn.Module:
    """The network with BatchNorm over the whole batch instead of each process's shard of it.

    Raises:
        InputError: If there is BatchNorm and there are several processes on a CPU.
    """
    if world.size == 1:
        return model
    if has_batchnorm(model) and not next(model.parameters()).is_cuda:
        several = f"BatchNorm cannot be computed over {world.size} processes on a CPU"
        raise InputError(f"{several}; use GPUs, one process, or a model without it, such as mlp")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
