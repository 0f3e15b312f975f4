"""How calls are timed, the rates that a machine reaches, and the roofline that follows."""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer
from torch.utils.flop_counter import FlopCounterMode

from fmnlib.models import number_format


def measure(call: Callable[[], object], once: bool = False) -> Measurement:
    """Time a call for a second or once, after one to warm up; the timer waits for the GPU."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.0 if once else 1.0)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device, the number format of its networks, and its measured rates per second."""

    device: torch.device
    dtype: torch.dtype
    operations: float
    bytes: float

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """Take the fastest of many large matrix products and of many large copies."""
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)  # the one that timers wait for
        dtype, side = number_format("auto", device), 8192 if cuda else 2048
        left = torch.randn(side, side, device=device, dtype=dtype)
        right, out = left.t().contiguous(), torch.empty_like(left)
        product = min(measure(lambda: torch.mm(left, right, out=out)).times)
        source = torch.empty(2**28 if cuda else 2**26, device=device)
        target = torch.empty_like(source)
        copied = min(measure(lambda: target.copy_(source)).times)
        return cls(device, dtype, 2 * side**3 / product, 2 * source.nbytes / copied)

    def roofline(self, operations: float, moved: float) -> tuple[float, str]:
        """The least seconds for so many operations and bytes, and which of them takes longer."""
        return max((operations / self.operations, "operations"), (moved / self.bytes, "bytes"))


def work(
    model: nn.Module, shape: tuple[int, ...], batch: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Operations and least bytes of training on one image, counted without computing anything.

    Outputs of layers with weights are written once and read once; weights, gradients and momentum
    pass seven times a step.

    >>> work(nn.Linear(8, 4, bias=False), (8,), 2, torch.float32)  # no gradient of the images
    (128.0, 480.0)
    """
    model = copy.deepcopy(model).to("meta")
    outputs: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *call: outputs.append(call[-1].numel()))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, *shape, device="meta")).sum().backward()
    moved = 2 * sum(outputs) * dtype.itemsize + 7 * sum(p.nbytes for p in model.parameters())
    return counter.get_total_flops() / batch, moved / batch
