"""A function of tensors on a GPU, captured as a CUDA graph, proven and replayed.

At batches of 128 small images a GPU computes a step faster than Python launches it. But a graph
keeps every address and number of its capture, be it right or wrong: so each is proven.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

EAGER_CALLS = 3  # with inputs of a size before its capture: libraries choose their kernels
TOLERANCE = 0.05  # of a change; sums in any order differ by less, what is wrong by more


class Graphs:
    """Calls of a function, replayed as CUDA graphs, one for each length of its first input.

    A graph is captured on zeros and proven at the next call: from the same state a call and a
    replay have to change each kind of tensor alike, within `TOLERANCE` of the sum of its absolute
    changes. If capture or proof fail, calls go on without graphs, and one warning says why.

    Args:
        call: Takes tensors, returns nothing, and changes the tensors of `state` in place.
        state: Gives all tensors that a call changes, by name; nothing else outlives a call.
    """

    def __init__(self, call: Callable[..., None], state: Callable[[], dict[str, Tensor]]) -> None:
        self._call, self._state, self._device = call, state, next(iter(state().values())).device
        # One of each: streams are few, and graphs that never run side by side share memory.
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
            graph, held = self._captured[size]
            torch._foreach_copy_(held, inputs)
            if self._calls[size] == EAGER_CALLS + 1:
                self._prove(graph, inputs)
            else:
                graph.replay()

    def _call_aside(self, inputs: Sequence[Tensor]) -> None:
        """Call on the stream of captures, as before a capture one has to."""
        usual = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            self._call(*inputs)
        usual.wait_stream(self._stream)

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        held, graph = [torch.zeros_like(tensor) for tensor in inputs], torch.cuda.CUDAGraph()
        usual, reason = torch.cuda.current_stream(self._device), ""
        self._captured[len(inputs[0])] = graph, held
        before = {name: tensor.clone() for name, tensor in self._state().items()}
        try:
            # Other threads may use the GPU: the last epoch is on its way to the disk.
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                self._call(*held)
        except RuntimeError as error:  # the end of a capture that failed fails, too
            reason = str(error.__context__ or error).partition("\n")[0] or "unknown"
        torch.cuda.set_stream(usual)  # a capture that failed leaves its own
        torch._foreach_copy_([*self._state().values()], [*before.values()])  # nothing ran
        if reason:  # by now the error is freed, and with it what the call allocated
            self._give_up(reason)

    def _prove(self, graph: torch.cuda.CUDAGraph, inputs: Sequence[Tensor]) -> None:
        """Call and replay, from the same state; where they differ, what the call did stays."""
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
    """Which kind of tensor, such as all weights, a replay changes otherwise than a call; or ""."""
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
