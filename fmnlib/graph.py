"""A function of GPU tensors, captured as a CUDA graph, checked against a call, and replayed.

With batches of 128 small images a GPU computes a step faster than Python launches its kernels. A
graph keeps all addresses and Python numbers of its capture, even wrong ones: so each is checked.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

EAGER_CALLS = 3  # calls per input size before its capture, in which libraries choose kernels
TOLERANCE = 0.05  # relative to the change; rounding errors are smaller, faults larger


class Graphs:
    """Calls of a function, replayed as CUDA graphs, one for each length of its first input.

    A graph is captured on zeros and checked at the next call: from the same state, a call and a
    replay must change each kind of tensor equally, within `TOLERANCE` of the sum of its absolute
    changes. If capture or check fail, calls go on without graphs, and one warning says why.

    Args:
        call: Takes tensors, returns nothing, and changes the tensors of `state` in place.
        state: Returns all tensors that a call changes, by name; a call must change nothing else.
    """

    def __init__(self, call: Callable[..., None], state: Callable[[], dict[str, Tensor]]) -> None:
        self._call, self._state, self._device = call, state, next(iter(state().values())).device
        # One of each for all graphs: streams are few, and graphs that do not overlap share memory.
        self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        self._calls: Counter[int] = Counter()
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._works = True

    def __call__(self, *inputs: Tensor) -> None:
        """Call the function, or replay it."""
        size = len(inputs[0])
        self._calls[size] += 1
        if not self._works:
            self._call(*inputs)
        elif self._calls[size] <= EAGER_CALLS:
            self._call_aside(inputs)
            if self._calls[size] == EAGER_CALLS:
                self._capture(inputs)
        else:
            graph, static = self._captured[size]
            torch._foreach_copy_(static, inputs)
            if self._calls[size] == EAGER_CALLS + 1:
                self._verify(graph, inputs)
            else:
                graph.replay()

    def _call_aside(self, inputs: Sequence[Tensor]) -> None:
        """Call the function on the capture stream, as PyTorch requires before a capture."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._call(*inputs)
        current.wait_stream(self._stream)

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        static, graph = [torch.zeros_like(tensor) for tensor in inputs], torch.cuda.CUDAGraph()
        current, reason = torch.cuda.current_stream(self._device), ""
        self._captured[len(inputs[0])] = graph, static
        before = {name: tensor.clone() for name, tensor in self._state().items()}
        try:
            # Another thread, which writes the last epoch to disk, may use the GPU meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                self._call(*static)
        except RuntimeError as error:  # ending a failed capture raises as well
            reason = str(error.__context__ or error).partition("\n")[0] or "unknown"
        torch.cuda.set_stream(current)  # a failed capture leaves its own stream set
        torch._foreach_copy_([*self._state().values()], [*before.values()])  # as if nothing ran
        if reason:  # by now the error is freed, and with it what the call allocated
            self._give_up(reason)

    def _verify(self, graph: torch.cuda.CUDAGraph, inputs: Sequence[Tensor]) -> None:
        """Compare a call and a replay from one state; if they differ, keep the call's result."""
        random = torch.cuda.get_rng_state(self._device)
        before = {name: tensor.clone() for name, tensor in self._state().items()}
        self._call_aside(inputs)
        called = {name: tensor.clone() for name, tensor in self._state().items()}
        torch._foreach_copy_([*self._state().values()], [*before.values()])
        torch.cuda.set_rng_state(random, self._device)
        graph.replay()
        if reason := _difference(before, called, self._state()):
            torch._foreach_copy_([*self._state().values()], [*called.values()])
            self._give_up(f"a replay changes {reason}")

    def _give_up(self, reason: str) -> None:
        self._works = False
        self._captured.clear()
        warnings.warn(f"steps are called, not replayed as CUDA graphs ({reason})", stacklevel=5)


def _difference(before: Mapping[str, Tensor], *after: Mapping[str, Tensor]) -> str:
    """Describe the first kind of tensor that a replay changes unlike a call; "" if none."""
    sums: dict[str, Tensor] = {}
    for name, tensor in before.items():
        start, called, replayed = (x.double() for x in (tensor, *(of[name] for of in after)))
        pair = torch.stack([(called - start).abs().sum(), (replayed - called).abs().sum()])
        kind = f"{name.partition('.')[0]} {name.rpartition('.')[2]}"
        sums[kind] = sums.get(kind, torch.zeros_like(pair)) + pair
    for kind, pair in sums.items():
        change, off = pair.tolist()
        if not off <= TOLERANCE * change:
            return f"{kind} otherwise than a call: by {change:.3g}, off by {off:.3g}"
    return ""
