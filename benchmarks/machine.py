"""What the machine can do: its measured rates, and the floor that they set for a network.

A floor takes the operations at the rate of a large matrix product, or the bytes at the rate of a
large copy, whichever takes longer.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Machine", "Work", "disk_rate", "work"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device, how its networks compute, and its rates.

    Attributes:
        device: Where it runs.
        dtype: Number format of matrix products.
        operations: Multiplications and additions of matrix products per second.
        bytes: Bytes read or written per second by a large copy.
    """

    device: torch.device
    dtype: torch.dtype
    operations: float
    bytes: float

    @classmethod
    def measure(cls, device: torch.device) -> "Machine":
        """Multiply and copy until the rates are known; takes seconds."""
        cuda = device.type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        side = 8192 if cuda else 2048
        left = torch.randn(side, side, device=device, dtype=dtype)
        right, out = left.t().contiguous(), torch.empty_like(left)
        product = best(lambda: torch.mm(left, right, out=out), device)
        source = torch.empty(2**28 if cuda else 2**26, device=device)
        target = torch.empty_like(source)
        copied = best(lambda: target.copy_(source), device)
        moved = 2 * source.numel() * source.element_size()
        return cls(device, dtype, 2 * side**3 / product, moved / copied)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = "" if self.device.type == "cuda" else f", {torch.get_num_threads()} threads"
        return f"{name}{threads}, {str(self.dtype).removeprefix('torch.')}"

    def seconds(self, operations: float, moved: float) -> tuple[float, str]:
        """The least time for so many operations and bytes, and which of them takes it."""
        times = {"operations": operations / self.operations, "bytes": moved / self.bytes}
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


@dataclasses.dataclass(frozen=True)
class Work:
    """What a network does for one image.

    Attributes:
        forward: Operations of matrix products and convolutions to predict.
        training: Those to predict and to find the gradients.
        moved: Bytes that training must move: what each layer with weights puts out is written once
            and read once; weights, gradients and momentum pass seven times a step.
    """

    forward: float
    training: float
    moved: float


def work(model: nn.Module, shape: tuple[int, ...], batch: int, dtype: torch.dtype) -> Work:
    """Count the work of a network on batches of images, without computing anything.

    >>> counted = work(nn.Linear(8, 4, bias=False), (8,), 2, torch.float32)
    >>> counted.forward, counted.training  # no gradient of the images is needed
    (64.0, 128.0)
    >>> counted.moved  # 2 x 4 numbers out; 7 x 32 weights for two images; of 4 bytes
    480.0
    """
    model = copy.deepcopy(model).to("meta")
    put_out: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *call: put_out.append(call[-1].numel()))
    images = torch.zeros(batch, *shape, device="meta")
    forward, training = (FlopCounterMode(display=False) for _ in range(2))
    with training:
        model(images).sum().backward()
    weights = sum(parameter.numel() for parameter in model.parameters())
    moved = 2 * sum(put_out) * dtype.itemsize + 7 * weights * 4
    with forward, torch.no_grad():
        model(images)
    return Work(
        forward.get_total_flops() / batch, training.get_total_flops() / batch, moved / batch
    )


def best(call: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float:
    """The least time of a call, after one to warm up, out of as many as a second holds."""
    call()
    found, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found = min(found, time.perf_counter() - start)
    return found


def wait(device: torch.device) -> None:
    """Wait for everything that was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def disk_rate(folder: Path) -> float:
    """Bytes written to a file per second."""
    content = bytes(2**26)
    file = folder / "rate"
    written = best(lambda: file.write_bytes(content), torch.device("cpu"))
    file.unlink()
    return len(content) / written
