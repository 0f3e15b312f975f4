"""A stand-in for CUDA: tensors of the CPU that say that they lie on a GPU; their numbers are real.

Where a tensor lies is kept by its memory, so that views, gradients and copies follow. What a GPU
would refuse, or get wrong without a word, is refused here: tensors of two devices in one call,
waits of the host where there should be none, tensors that one stream takes from another without
waiting for it, a stream of the pool that is still in use. A capture runs nothing for good; a
replay is the same calls on the same memory, and leaves nothing in the graph's own.
"""

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST, POOL = torch.device("cpu"), 32  # streams of a GPU that torch hands out in turn
aten = torch.ops.aten
WAITS = {
    getattr(aten, name).default
    for name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero")
}
INDEXED = {aten.index.Tensor, aten.index_put_.default}
ELSEWHERE = threading.local()  # of a thread: its streams, and whether the stand-in looks away


def tensors_in(*tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def unseen():
    """What is done here is the stand-in's own."""
    before, ELSEWHERE.unseen = getattr(ELSEWHERE, "unseen", False), True
    try:
        yield
    finally:
        ELSEWHERE.unseen = before


class Stream:
    """Work in order; `known` is how much of the other streams' work comes before the next."""

    __class__ = torch.cuda.Stream  # for those who check types

    def __init__(self, gpu, device=None, priority=0):
        self.gpu, self.device = gpu, gpu.resolve("cuda" if device is None else device)
        gpu.handed_out += 1
        self.handle = gpu.handed_out % POOL
        others = [s for s in gpu.streams if (s.device, s.handle) == (self.device, self.handle)]
        assert not others, "a stream of the pool is handed out while it is in use"
        gpu.streams.add(self)
        self.done, self.known = 0, {}

    def wait_stream(self, other):
        self.learn({**other.known, id(other): other.done})

    def learn(self, known):
        self.known = {k: max(self.known.get(k, 0), known.get(k, 0)) for k in self.known | known}

    def synchronize(self):
        self.gpu.host_waits(self, "synchronize")


class Event:
    def record(self, stream=None):
        self.known = {**stream.known, id(stream): stream.done}

    def wait(self, stream):
        stream.learn(self.known)


class Graph:
    """Calls in order, with the tensors that they were made with."""

    __class__ = torch.cuda.CUDAGraph

    def __init__(self, gpu):
        self.gpu, self.calls, self.own, self.before = gpu, [], {}, {}
        self.replays, self.stream, self.pool = 0, None, None
        gpu.graphs.add(self)

    def replay(self):
        self.replays += 1
        with unseen(), torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tensors_in(out), tensors_in(func(*args, **kwargs))):
                    if memory(old) != memory(new):
                        old.copy_(new)
        if self.calls:
            seen = [t for _, args, kwargs, _ in self.calls for t in tensors_in(args, kwargs)]
            self.gpu.used(seen, self.gpu.current_stream(self.stream.device))
        self.forget()

    def forget(self):
        """Its own memory is that of the next graph, too: what is read there later is no number."""
        with unseen(), torch.no_grad():
            for whole in self.own.values():
                if whole.is_floating_point():
                    whole.fill_(torch.nan)


class Generator(torch._C.Generator):
    def __new__(cls, device="cpu"):
        made = torch._C.Generator.__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)


class Autocast(torch.autocast):
    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        super().__init__("cpu", dtype, enabled, cache_enabled)


class Calls(TorchDispatchMode):
    """Every call that computes."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(ELSEWHERE, "unseen", False):
            return func(*args, **kwargs)
        return self.gpu.call(func, args, kwargs)


class Places(TorchFunctionMode):
    """Every function of torch that is told a device."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if getattr(ELSEWHERE, "unseen", False):
            return func(*args, **kwargs)
        if device is None or torch.device(device).type not in ("cpu", "cuda"):
            out = func(*args, **kwargs)
        else:
            device = self.gpu.resolve(device)
            if func is torch.tensor and device != HOST:
                self.gpu.host_waits(self.gpu.current_stream(device), "torch.tensor on the GPU")
            out = func(*args, **(kwargs | {"device": "cpu"}))
            self.gpu.put(out, device)
        generator = kwargs.get("generator")
        if generator is not None and isinstance(out, torch.Tensor):
            drawn, places = self.gpu.resolve(generator.device), self.gpu.place(out)
            if drawn != places:
                raise RuntimeError(f"a generator of {drawn} draws on {places}")
        return out


class StandIn:
    """Two GPUs of a compute capability.

    Attributes:
        waits: What the host waited for.
        graphs: Those that are still held.
        captured: Stream, pool and number of calls of each capture.
        strict: Whether a wait of the host is an error now.
    """

    def __init__(self, capability=(8, 0), count=2):
        self.capability, self.count, self.current = capability, count, 0
        self.where, self.users, self.host = {}, {}, {}
        self.lock = threading.RLock()
        self.streams, self.handed_out = weakref.WeakSet(), 0
        self.graphs, self.captured = weakref.WeakSet(), []
        self.waits, self.strict = [], False
        self.capturing, self.capturer, self.usual_capture_stream = None, None, None
        self.usual = [Stream(self, f"cuda:{n}") for n in range(count)]
        for number, stream in enumerate(self.usual):
            stream.handle = f"usual {number}"

    # -------------------------------------------------------------- places

    def resolve(self, device):
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.current)
        if device.type == "cuda" and device.index >= self.count:
            raise RuntimeError("invalid device ordinal")
        return device

    def place(self, tensor):
        found = self.where.get(memory(tensor))
        if found is None or found[0].expired():
            return TENSOR["device"].__get__(tensor)
        return found[1]

    def put(self, out, device):
        with self.lock:
            for tensor in tensors_in(out):
                if device == HOST:
                    self.where.pop(memory(tensor), None)
                else:
                    kept = StorageWeakRef(tensor.untyped_storage())
                    self.where[memory(tensor)] = kept, device
            if len(self.where) > 20_000:
                self.where = {k: v for k, v in self.where.items() if not v[0].expired()}
                self.users = {k: v for k, v in self.users.items() if k in self.where}

    # -------------------------------------------------------------- order

    def streams_of_thread(self):
        if getattr(ELSEWHERE, "gpu", None) is not self:
            ELSEWHERE.gpu, ELSEWHERE.streams = self, dict(enumerate(self.usual))
        return ELSEWHERE.streams

    def current_stream(self, device=None):
        return self.streams_of_thread()[self.resolve("cuda" if device is None else device).index]

    def set_stream(self, stream):
        self.streams_of_thread()[stream.device.index] = stream

    @contextlib.contextmanager
    def stream(self, stream):
        before, current = self.current_stream(stream.device), self.current
        self.set_stream(stream)
        self.current = stream.device.index if self.in_main() else current
        yield
        self.set_stream(before)
        self.current = current if self.in_main() else self.current

    @staticmethod
    def in_main():
        return threading.current_thread() is threading.main_thread()

    def used(self, tensors, stream):
        """A stream uses tensors: it has to come after all who did so before."""
        with self.lock:
            stream.learn(self.host)
            stream.done += 1
            for tensor in tensors:
                user, done, kept = self.users.get(memory(tensor), (stream, 0, None))
                if kept is not None and not kept.expired() and user is not stream:
                    late = stream.known.get(id(user), 0) < done
                    assert not late, "a stream takes a tensor of another without waiting for it"
                kept = StorageWeakRef(tensor.untyped_storage())
                self.users[memory(tensor)] = stream, stream.done, kept

    def host_waits(self, stream, why):
        if self.mine():
            raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
        self.waits.append(why)
        assert not (self.strict and self.in_main()), f"the host waits for the GPU: {why}"
        known = {**stream.known, id(stream): stream.done}
        self.host = {k: max(self.host.get(k, 0), known.get(k, 0)) for k in self.host | known}

    # -------------------------------------------------------------- calls

    def mine(self):
        return self.capturing is not None and self.capturer == threading.get_ident()

    def call(self, func, args, kwargs):
        given = tensors_in(args, kwargs)
        places = [self.place(tensor) for tensor in given]
        gpus = {place for place in places if place.type == "cuda"}
        if not gpus:
            return func(*args, **kwargs)
        if len(gpus) > 1:
            raise RuntimeError(f"tensors of {len(gpus)} devices in {func}")
        [device] = gpus
        stream = self.current_stream(device)
        foreign = any(p == HOST and t.dim() > 0 for p, t in zip(places, given))
        masks = func in INDEXED and any(index.dtype == torch.bool for index in tensors_in(args[1]))
        if foreign and func not in (aten.copy_.default, aten.index.Tensor):
            raise RuntimeError(f"tensors on the host and on {device} in {func}")
        if foreign or func in WAITS or masks:
            self.host_waits(stream, str(func))
        recorded = self.mine() and self.capturing.stream.device == device
        if recorded:
            self.save(given)
        out = func(*args, **kwargs)
        made = tensors_in(out)
        known = {memory(tensor) for tensor in given}
        fresh = [tensor for tensor in made if memory(tensor) not in known]
        self.put(fresh, device)
        gpu_only = [t for t, p in zip(given, places) if p == device]
        if recorded:
            if fresh or func._schema.is_mutable or not made:
                self.capturing.calls.append((func, args, kwargs, out))
            for tensor in fresh:
                self.capturing.own.setdefault(memory(tensor), whole(tensor))
        else:
            self.used(gpu_only + fresh, stream)
        return out

    def save(self, tensors):
        with unseen(), torch.no_grad():
            for tensor in tensors:
                key, graph = memory(tensor), self.capturing
                if key not in graph.own and key not in graph.before:
                    graph.before[key] = whole(tensor), whole(tensor).clone()

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        if stream is None:  # as torch does: one for the process, of the GPU that came first
            self.usual_capture_stream = self.usual_capture_stream or Stream(self)
            stream = self.usual_capture_stream
        with self.refusing_waits(False):  # torch waits, once
            self.current_stream(stream.device).synchronize()
        random = torch.get_rng_state()
        context = self.stream(stream)
        context.__enter__()
        graph.stream, graph.pool = stream, pool
        self.capturing, self.capturer = graph, threading.get_ident()
        failed = True
        try:
            yield
            failed = False
        finally:
            self.capturing = None
            with unseen(), torch.no_grad():  # in truth nothing ran
                for real, before in graph.before.values():
                    real.copy_(before)
            graph.before = {}
            torch.set_rng_state(random)
            if failed:
                raise RuntimeError("operation failed due to a previous error during capture")
            context.__exit__(None, None, None)
        graph.forget()
        self.captured.append((stream, pool, len(graph.calls)))

    # -------------------------------------------------------------- torch

    def to(self, tensor, *args, copy=False, **kwargs):
        with unseen():
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        rest = {"dtype": tensor.dtype if dtype is None else dtype}
        if layout is not None:
            rest["memory_format"] = layout
        here = self.place(tensor)
        there = here if device is None else self.resolve(device)
        if "meta" in (here.type, there.type):
            return TENSOR["to"](tensor, *args, copy=copy, **kwargs)
        if here == there:
            return TENSOR["to"](tensor, copy=copy, **rest)
        gpu = there if here == HOST else here
        with unseen():
            out = TENSOR["to"](tensor, copy=True, **rest)
        self.used([out if here == HOST else tensor], self.current_stream(gpu))
        self.put(out, there)
        if not (non_blocking and here == HOST):
            self.host_waits(self.current_stream(gpu), f"copy from {here} to {there}")
        return out

    def on_host(self, name):
        def method(tensor, *args, **kwargs):
            if self.place(tensor).type == "cuda":
                raise TypeError(f"{name} of a tensor on the GPU; copy it to the host first")
            return TENSOR[name](tensor, *args, **kwargs)

        return method

    def deepcopy(self, tensor, memo):
        out = TENSOR["__deepcopy__"](tensor, memo)
        self.put(out, self.place(tensor))
        return out

    def by_device(self, lists, *args, **kwargs):
        groups = GROUP(lists, *args, **kwargs)
        [device] = {self.place(t) for each in lists for t in each if t is not None}
        return {(device, dtype): group for (_, dtype), group in groups.items()}

    def submit(self, pool, job, *args):
        def with_modes():
            with Calls(self), Places(self):
                return job(*args)

        return SUBMIT(pool, with_modes)

    @contextlib.contextmanager
    def device_of(self, tensor):
        before, place = self.current, self.place(tensor)
        self.current = place.index if place.type == "cuda" else before
        yield
        self.current = before

    @contextlib.contextmanager
    def refusing_waits(self, strict=True):
        before, self.strict = self.strict, strict
        try:
            yield
        finally:
            self.strict = before

    def install(self, patch):
        """Put it in the place of torch's CUDA; a context has to be entered as well."""
        # Lightning sets it, and torch then takes a count of devices for a driver.
        patch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
        for name, value in {
            "device": property(self.place),
            "is_cuda": property(lambda tensor: self.place(tensor).type == "cuda"),
            "get_device": lambda tensor: (
                -1 if self.place(tensor) == HOST else self.place(tensor).index
            ),
            "to": lambda tensor, *args, **kwargs: self.to(tensor, *args, **kwargs),
            "cpu": lambda tensor, **_: self.to(tensor, HOST),
            "numpy": self.on_host("numpy"),
            "__array__": self.on_host("__array__"),
            "tolist": lambda tensor: TENSOR["tolist"](self.to(tensor, HOST)),
            "__deepcopy__": lambda tensor, memo: self.deepcopy(tensor, memo),
        }.items():
            patch.setattr(torch.Tensor, name, value)
        for name, value in {
            "Stream": lambda *args, **kwargs: Stream(self, *args, **kwargs),
            "Event": Event,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.graph,
            "graph_pool_handle": object,
            "stream": self.stream,
            "current_stream": self.current_stream,
            "set_stream": self.set_stream,
            "set_device": lambda device: setattr(self, "current", self.resolve(device).index),
            "current_device": lambda: self.current,
            "device_of": self.device_of,
            "device_count": lambda: self.count,
            "synchronize": lambda device=None: self.current_stream(device).synchronize(),
            "get_rng_state": lambda device="cuda": torch.get_rng_state(),
            "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: "a stand-in",
            "is_current_stream_capturing": self.mine,
            "set_sync_debug_mode": lambda mode: setattr(self, "strict", mode == "error"),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", self.by_device)
        patch.setattr(ThreadPoolExecutor, "submit", lambda *args: self.submit(*args))

    def held(self):
        """The graphs that something holds, without the help of the garbage collector."""
        assert not gc.isenabled()
        return len(self.graphs)


def whole(tensor):
    """All of a tensor's memory, as numbers of its type."""
    with unseen():
        return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


TENSOR = {
    name: getattr(torch.Tensor, name)
    for name in ("device", "to", "numpy", "__array__", "tolist", "__deepcopy__")
}
GROUP, SUBMIT = torch._C._group_tensors_by_device_and_dtype, ThreadPoolExecutor.submit


@contextlib.contextmanager
def standing_in(patch, **options):
    """A stand-in, in its place and watching."""
    gpu = StandIn(**options)
    gpu.install(patch)
    with Calls(gpu), Places(gpu):
        yield gpu
