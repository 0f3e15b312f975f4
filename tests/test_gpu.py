"""The GPU path, on a stand-in for CUDA; with `pytest --device cuda`, on the first GPU."""

import contextlib
import copy
import dataclasses
import gc
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import first_gpu
from fmnlib import RunConfig, checkpoint, graph, parallel, recorder, step, training
from fmnlib.checkpoint import checkpoint_path, load_tensors
from fmnlib.config import Paused
from fmnlib.data import DataSet, load
from fmnlib.distillation import average, distill, members_of, student_config
from fmnlib.fusion import Fusion
from fmnlib.graph import EAGER_CALLS, Graphs
from fmnlib.images import ImageFiles, Preprocessing
from fmnlib.models import number_format
from fmnlib.paper.features import last_layer_inputs
from fmnlib.parallel import World
from fmnlib.step import Step, TrainingState, make_optimizer, make_scaler
from fmnlib.training import build_model, train
from tests.stand_in import Event, Stream, standing_in

# Batches of 31 and, once an epoch, of 30: both are called, captured, proven and replayed.
SMALL = RunConfig(
    model="mlp", train_samples=123, eval_samples=40, batch_size=32, epochs=5, lr=0.02,
    precision="float32", augment="crop", noise="symmetric", noise_rate=0.2,
)  # fmt: skip


@pytest.fixture
def gpu(request, monkeypatch):
    """A stand-in, in which no step may make the host wait; None where a GPU is asked for."""
    if request.config.getoption("device") == "cuda":
        yield None
        return
    with standing_in(monkeypatch) as stand_in:
        refuse_waits(monkeypatch, stand_in)
        yield stand_in


@pytest.fixture
def stand_in(gpu):
    """A stand-in; what is asked of it no GPU can answer."""
    if gpu is None:
        pytest.skip("of the stand-in alone")
    return gpu


def refuse_waits(patch, gpu):
    epoch, prove = training._train_epoch, Graphs._verify

    def strict(*given):
        with gpu.refusing_waits():
            return epoch(*given)

    def proof(*given):
        with gpu.refusing_waits(False):  # once for each size
            prove(*given)

    patch.setattr(training, "_train_epoch", strict)
    patch.setattr(Graphs, "_verify", proof)


@pytest.fixture
def replays(monkeypatch):
    """How often each size of batch is replayed."""
    counts, call = {}, Graphs.__call__

    def counting(self, *inputs):
        call(self, *inputs)
        size = len(inputs[0])
        if self._works and self._calls[size] > EAGER_CALLS:
            counts[size] = counts.get(size, 0) + 1

    monkeypatch.setattr(Graphs, "__call__", counting)
    return counts


def run(config, folder, device="cuda", **options):
    return train(config, folder, device=device, progress=False, **options)


def dropping():
    """A network with all that is particular in training: dropout, statistics, layers."""
    first, last = nn.Linear(64, 48), nn.Linear(48, 10)
    return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(), last)


def assert_same(one, other, gpu):
    """Bit for bit in a stand-in; on a GPU sums may run in any order."""
    for name in sorted(set(one.curves) - {"seconds"}):
        a, b = one.curves[name], other.curves[name]
        if gpu is None:
            np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02)
        else:
            np.testing.assert_array_equal(a, b)
    if gpu is None:
        np.testing.assert_allclose(one.probs, other.probs, atol=0.1)
    else:
        np.testing.assert_array_equal(one.probs, other.probs)


def assert_replays_change_nothing(folder, gpu, config, **options):
    replayed = run(config, folder / "replayed", **options)
    assert_same(replayed, run(config, folder / "called", graphs=False, **options), gpu)


WAYS = {
    "sgd": {},
    "without momentum": {"momentum": 0.0},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
    "average and clipping": {"ema": 0.9, "clip_norm": 0.5},
    "convolutions": {"model": "convnet", "augment": "crop_flip"},
    "bfloat16": {"precision": "auto", "label_smoothing": 0.1, "warmup": 1.0},
    "float16": {"precision": "float16", "ema": 0.5, "schedule": "cyclic"},
    "memory of elr": {"loss": "elr"},
    "memory of sat": {"loss": "sat", "loss_parameters": (0.5, 0.5)},
    "memory of ps_kd": {"loss": "ps_kd"},
    "float16, clipped": {"precision": "float16", "clip_norm": 0.5, "augment": "none"},
}


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_replays_change_nothing(tmp_path, gpu, replays, changes):
    config = dataclasses.replace(SMALL, **changes)
    assert_replays_change_nothing(tmp_path, gpu, config)
    assert len(replays) == 2
    assert min(replays.values()) >= 2


def test_replays_draw_new_random_numbers(tmp_path, gpu, replays):
    assert_replays_change_nothing(tmp_path, gpu, SMALL, build=dropping)
    assert len(replays) == 2


def test_a_gpu_learns_the_digits_too(tmp_path, gpu):
    config = RunConfig(epochs=5, augment="crop", train_samples=500, eval_samples=200)
    record = run(config, tmp_path)
    assert record.accuracy[-1] > 0.8
    assert record.provenance["device"] == torch.cuda.get_device_name()


@pytest.fixture
def teacher(tmp_path, gpu):
    run(dataclasses.replace(SMALL, model="convnet"), tmp_path / "teacher")
    return members_of(
        dataclasses.replace(SMALL, model="convnet"),
        tmp_path / "teacher",
        Fusion(np.array([0, 0, 0.5, 0.25, 0.25])),
    )


STUDENTS = {
    "asks for every view": {},
    "of views in advance": {"teacher_views": 3},
    "from the teacher's weights": {"init": "teacher", "temperature": 3.0},
    "of whole images": {"augment": "none"},
}


@pytest.mark.parametrize("changes", STUDENTS.values(), ids=STUDENTS)
def test_students_are_replayed_too(tmp_path, gpu, teacher, replays, changes, monkeypatch):
    kept = {k: v for k, v in changes.items() if k != "augment"}
    config = student_config(teacher[0].config, "kf", teacher, **kept)
    config = dataclasses.replace(config, augment=changes.get("augment", config.augment))
    replayed = distill(config, teacher, tmp_path / "a", device="cuda", progress=False)
    assert len(replays) == 2
    monkeypatch.setattr(graph, "EAGER_CALLS", 10**9)
    called = distill(config, teacher, tmp_path / "b", device="cuda", progress=False)
    assert_same(replayed, called, gpu)


def test_averages_are_those_of_the_cpu(tmp_path, gpu, teacher):
    config = student_config(teacher[0].config, "averaged_kf", teacher)
    one, other = (
        average(config, teacher, tmp_path / device, device=device) for device in ("cuda", "cpu")
    )
    weights = [load_tensors(checkpoint_path(tmp_path / d, 0)) for d in ("cuda", "cpu")]
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(one.probs, other.probs, atol=0.02)


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"precision": "float16"}], ids=["ema", "half"])
def test_a_run_that_is_paused_goes_on_with_the_same_bits(tmp_path, gpu, changes):
    config = dataclasses.replace(SMALL, **changes)
    whole = run(config, tmp_path / "whole")
    for _ in range(config.epochs - 1):
        with pytest.raises(Paused):
            run(config, tmp_path / "paused", deadline=0.0)
    assert_same(whole, run(config, tmp_path / "paused"), gpu)


# ---------------------------------------------------------------- number formats


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 6), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_the_number_format_is_what_the_gpu_has_units_for(stand_in, capability, dtype):
    stand_in.capability = capability
    device = torch.device("cuda", 1)
    assert number_format("auto", device) == dtype
    assert make_scaler(RunConfig(), device).is_enabled() == (dtype == torch.float16)
    for asked in ("float32", "float16", "bfloat16"):
        assert number_format(asked, device) == getattr(torch, asked)
    assert number_format("auto", torch.device("cpu")) == torch.float32


def test_a_run_on_an_older_gpu_computes_and_keeps_float16(tmp_path, stand_in):
    stand_in.capability, seen = (7, 5), []
    config = dataclasses.replace(SMALL, precision="auto", epochs=2)

    def loss(logits, batch):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return F.cross_entropy(logits, batch.index % 10, reduction="none")

    def build():
        net = dropping()
        net[-1].register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
        return net

    run(config, tmp_path, criterion=loss, build=build)
    assert set(seen) == {None, torch.float16}
    kept = load_tensors(checkpoint_path(tmp_path, 1))
    assert kept["1.weight"].dtype == torch.float16
    assert kept["1.bias"].dtype == torch.float32


def hasty(config, device):
    """A scaler whose factor doubles until steps overflow, every other step."""
    scaler = make_scaler(config, device)
    scaler.set_growth_interval(2)
    return scaler


def paused_and_whole(folder, monkeypatch):
    """The losses of a run in float16 on the CPU that is paused, and of one that is not."""
    monkeypatch.setattr(training, "make_scaler", hasty)
    config = dataclasses.replace(SMALL, precision="float16", epochs=12, lr=0.05)
    for _ in range(config.epochs - 1):
        with pytest.raises(Paused):
            run(config, folder / "paused", device="cpu", deadline=0.0)
    records = [run(config, folder / name, device="cpu") for name in ("paused", "whole")]
    return [record.curves["train_loss"] for record in records]


def test_a_resumed_run_goes_on_with_the_scale_of_its_loss(tmp_path, monkeypatch):
    paused, whole = paused_and_whole(tmp_path, monkeypatch)
    np.testing.assert_array_equal(paused, whole)


def test_a_scale_that_is_not_saved_would_change_the_run(tmp_path, monkeypatch):
    saved = checkpoint.snapshot

    def without(parts):
        return {name: value for name, value in saved(parts).items() if "scaler" not in name}

    monkeypatch.setattr(checkpoint, "snapshot", without)
    paused, whole = paused_and_whole(tmp_path, monkeypatch)
    assert not np.array_equal(paused, whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_first_step_that_overflows_is_no_step(optimizer):
    config = dataclasses.replace(SMALL, precision="float16", optimizer=optimizer, weight_decay=0.1)
    data = load(config)
    model = build_model(config, data)
    parts = TrainingState(
        model, make_optimizer(config, model), model, make_scaler(config, data.device)
    )
    parts.scaler.update(2.0**60)
    criterion = training._criterion(config, data, None)
    taken = Step(config, data, parts, criterion, World(), graphs=True)
    [batch] = data.batches([torch.arange(32)], "none", 0)
    before = copy.deepcopy(model.state_dict())
    taken(batch, 0.1)
    assert parts.tensors()["scaler._scale"] == 2.0**59
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    for state in parts.optimizer.state.values():
        assert all(not value.any() for value in state.values())
    parts.scaler.update(1.0)
    taken(batch, 0.1)
    assert not torch.equal(model.state_dict()["1.weight"], before["1.weight"])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_features_are_of_the_runs_number_format(precision):
    config = dataclasses.replace(SMALL, precision=precision)
    data = load(config)
    found = last_layer_inputs(build_model(config, data), data, data.eval_images, precision)
    rounded = torch.from_numpy(found).bfloat16().double().numpy()
    assert np.array_equal(found, rounded) == (precision == "bfloat16")


# ---------------------------------------------------------------- streams, memory, devices


def test_captures_share_one_stream_and_one_pool(tmp_path, stand_in):
    run(SMALL, tmp_path)
    assert [calls > 20 for _, _, calls in stand_in.captured] == [True, True]
    assert len({(stream, pool) for stream, pool, _ in stand_in.captured}) == 1


def many_runs(folder, count=4):
    for seed in range(count):
        run(dataclasses.replace(SMALL, seed=seed, epochs=4), folder / str(seed))


def test_many_runs_in_a_process_find_streams(tmp_path, stand_in):
    many_runs(tmp_path)
    assert stand_in.handed_out <= 2 + 2 * 4  # one for captures and one to write on, a run


def test_a_second_gpu_in_a_process_learns_as_the_first(tmp_path, gpu, replays):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    first = run(SMALL, tmp_path / "first", device="cuda:0")
    second = run(SMALL, tmp_path / "second", device="cuda:1")
    assert_same(first, second, gpu)
    assert torch.cuda.current_device() == 0
    assert min(replays.values()) >= 4  # two a run
    assert_same(first, run(SMALL, tmp_path / "third"), gpu)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_lets_go_of_its_graphs(tmp_path, stand_in, fails, monkeypatch):
    if fails:
        monkeypatch.setattr(recorder.Recorder, "finish", lambda self: 1 / 0)
        monkeypatch.setattr(training, "learning_rate", rate_that_fails)
    gc.disable()
    try:
        with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
            run(SMALL, tmp_path)
        assert stand_in.captured
        assert stand_in.held() == 0
    finally:
        gc.enable()


def rate_that_fails(config, done):
    if done > 0.9:
        raise ArithmeticError("late in the run")
    return 0.01


def test_a_capture_that_fails_leaves_a_run_that_goes_on(tmp_path, gpu, monkeypatch):
    def mean(self, loss):
        if torch.cuda.is_current_stream_capturing():
            loss.sum().item()
        return loss.mean()

    monkeypatch.setattr(Step, "mean", mean)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record = run(SMALL, tmp_path / "failed")
    [warning] = [w for w in said if "CUDA graphs" in str(w.message)]
    assert "operation not permitted when stream is capturing" in str(warning.message)
    assert_same(record, run(SMALL, tmp_path / "called", graphs=False), gpu)


def test_a_replay_that_differs_leaves_the_outcome_of_calls(tmp_path, gpu, monkeypatch):
    """Half of the factor is drawn by Python, which a graph would keep."""
    whole = training._criterion

    def shaky(*given):
        rng = np.random.default_rng(0)
        loss = whole(*given)
        return lambda logits, batch: loss(logits, batch) * rng.choice([0.5, 2.0, 8.0])

    monkeypatch.setattr(training, "_criterion", shaky)
    with pytest.warns(UserWarning, match="a replay changes .* otherwise than a call") as said:
        run(SMALL, tmp_path)
    assert len(said) == 1


def test_seconds_end_when_the_gpu_is_done(tmp_path, stand_in, monkeypatch):
    usual, behind = stand_in.usual[0], []

    def clock():
        behind.append(usual.done - stand_in.host.get(id(usual), 0))
        return time.perf_counter()

    monkeypatch.setattr(training.time, "monotonic", clock)
    run(SMALL, tmp_path)
    assert len(behind) >= SMALL.epochs
    assert not any(behind)


def test_large_images_are_evaluated_few_at_a_time(stand_in):
    data, names = load(SMALL, "cuda"), np.array([b"1.png"])
    files = ImageFiles(Path(), names, np.array([0]), ["cat"], Preprocessing(size=224))
    assert training._eval_batch_size(data) == 2500
    streamed = dataclasses.replace(data, eval_images=files)
    assert training._eval_batch_size(streamed) == 256


def test_the_mean_over_processes_waits_for_no_gpu(stand_in, monkeypatch):
    monkeypatch.setattr(parallel.distributed, "all_reduce", lambda count: count.mul_(2))
    data = load(SMALL, "cuda")
    model = build_model(SMALL, data)
    parts = TrainingState(
        model, make_optimizer(SMALL, model), model, make_scaler(SMALL, data.device)
    )
    monkeypatch.setattr(World, "data_parallel", lambda world, model: model)
    shared = Step(SMALL, data, parts, training._criterion(SMALL, data, None), World(0, 2), True)
    loss = torch.arange(4.0, device="cuda")
    with stand_in.refusing_waits():
        mean = shared.mean(loss)
        with pytest.raises(AssertionError, match="host waits for the GPU: torch.tensor"):
            torch.tensor(4.0, device="cuda")
    assert mean.item() == 6 * 2 / 8


def test_processes_say_which_gpu_is_theirs(stand_in, monkeypatch):
    told = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(parallel.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(
        parallel.distributed, "init_process_group", lambda *given, **named: told.update(named)
    )
    assert parallel.join(torch.device("cuda")) == (World(1, 2), torch.device("cuda", 1))
    assert told["device_id"] == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 1


# ---------------------------------------------------------------- the first minutes on a GPU


@pytest.mark.parametrize("check", [name for name in first_gpu.CHECKS if name != "speed"])
def test_the_first_checks_on_a_gpu_pass(gpu, monkeypatch, check):
    if gpu is not None:
        quick = {"float16": first_gpu.WAYS["float16"], "ema": {"ema": 0.9}}
        monkeypatch.setattr(first_gpu, "WAYS", quick)
        small = dataclasses.replace(first_gpu.SMALL, model="mlp", precision="float32")
        monkeypatch.setattr(first_gpu, "SMALL", small)
    assert first_gpu.CHECKS[check](torch.device("cuda", 0))


def test_without_a_gpu_the_first_checks_say_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.first_gpu"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "device is 'cuda', which is not here" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- planted faults
#
# Each is a mistake that would be easy to make; the checks above have to find every one.


def a_learning_rate_that_python_knows(patch, gpu):
    take, call = Step._take, Step.__call__

    def remember(self, batch, lr):
        self.known = lr
        call(self, batch, lr)

    patch.setattr(Step, "__call__", remember)
    patch.setattr(Step, "_take", lambda self, *given: take(self, *given[:3], self.known))


def a_factor_that_python_draws(patch, gpu):
    mean, rng = Step.mean, np.random.default_rng(0)
    patch.setattr(Step, "mean", lambda self, loss: mean(self, loss) * rng.choice([0.5, 2.0, 8.0]))


def samples_that_python_knows(patch, gpu):
    """The indices of the batch that was captured."""
    take = Step._take

    def known(self, images, index, view, lr):
        with gpu.refusing_waits(False):
            if gpu.mine():
                index = torch.arange(len(index), device=index.device)
        take(self, images, index, view, lr)

    patch.setattr(Step, "_take", known)


def an_average_that_is_replaced(patch, gpu):
    def replace(ema, model, decay):
        for mean, value in zip(ema.parameters(), model.parameters()):
            mean.data = decay * mean.data + (1 - decay) * value.data

    patch.setattr(step, "_update_ema", replace)


def losses_that_are_replaced(patch, gpu):
    take = Step._take

    def replace(self, *given):
        self.losses = self.losses.clone()
        take(self, *given)

    patch.setattr(Step, "_take", replace)


def a_loss_that_the_host_reads(patch, gpu):
    patch.setattr(Step, "mean", lambda self, loss: loss.mean() + 0 * loss.sum().item())


def a_loss_that_the_host_copies(patch, gpu):
    patch.setattr(Step, "mean", lambda self, loss: loss.detach().cpu().mean() * 0 + loss.mean())


def a_number_that_the_host_sends(patch, gpu):
    def mean(self, loss):
        return loss.sum() / torch.tensor(float(len(loss)), device=loss.device)

    patch.setattr(Step, "mean", mean)


def a_mask_that_the_host_counts(patch, gpu):
    patch.setattr(Step, "mean", lambda self, loss: loss[loss > 0].mean())


def a_norm_that_the_host_checks(patch, gpu):
    clip = nn.utils.clip_grad_norm_

    def check(parameters, norm, **options):
        return clip(parameters, norm, error_if_nonfinite=True, **options)

    patch.setattr(nn.utils, "clip_grad_norm_", check)


def a_scale_that_the_host_reads(patch, gpu):
    update = torch.amp.GradScaler.update

    def read(self):
        update(self, self.get_scale())

    patch.setattr(torch.amp.GradScaler, "update", read)


def labels_on_the_host(patch, gpu):
    whole = training._criterion

    def on_the_host(config, data, memory):
        return whole(config, dataclasses.replace(data, labels=data.labels.cpu()), memory)

    patch.setattr(training, "_criterion", on_the_host)


def targets_on_the_host(patch, gpu):
    targets = torch.zeros(200)
    patch.setattr(Step, "mean", lambda self, loss: (loss + targets[: len(loss)]).mean())


def random_numbers_that_are_not_put_back(patch, gpu):
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)


def work_that_is_not_waited_for(patch, gpu):
    patch.setattr(Stream, "wait_stream", lambda self, other: None)


def a_writer_that_does_not_wait(patch, gpu):
    patch.setattr(Event, "wait", lambda self, stream: None)


PLANTS = {
    a_learning_rate_that_python_knows: "Arrays are not equal|otherwise than a call",
    a_factor_that_python_draws: "otherwise than a call",
    samples_that_python_knows: "otherwise than a call",
    an_average_that_is_replaced: "a replay changes ema .* otherwise",
    losses_that_are_replaced: "a replay changes step losses otherwise",
    a_loss_that_the_host_reads: "the host waits for the GPU: aten._local_scalar_dense",
    a_loss_that_the_host_copies: "the host waits for the GPU: copy from cuda:0 to cpu",
    a_number_that_the_host_sends: "the host waits for the GPU: torch.tensor",
    a_mask_that_the_host_counts: "the host waits for the GPU: aten.index",
    a_norm_that_the_host_checks: "the host waits for the GPU: aten.(is_nonzero|_local)",
    a_scale_that_the_host_reads: "the host waits for the GPU",
    labels_on_the_host: "tensors on the host|the host waits",
    targets_on_the_host: "tensors on the host and on cuda:0",
    random_numbers_that_are_not_put_back: "otherwise than a call",
    work_that_is_not_waited_for: "takes a tensor of another without waiting",
    a_writer_that_does_not_wait: "takes a tensor of another without waiting",
}
TRYING = dataclasses.replace(SMALL, ema=0.9, clip_norm=1.0, precision="float16")


def test_nothing_is_found_where_nothing_is_planted(tmp_path, stand_in):
    assert_replays_change_nothing(tmp_path, stand_in, TRYING, build=dropping)


@pytest.mark.parametrize(("plant", "told"), PLANTS.items(), ids=[p.__name__ for p in PLANTS])
def test_a_planted_fault_is_found(tmp_path, stand_in, monkeypatch, plant, told):
    plant(monkeypatch, stand_in)
    with pytest.raises((AssertionError, RuntimeError, UserWarning), match=told):
        assert_replays_change_nothing(tmp_path, stand_in, TRYING, build=dropping)


@pytest.mark.filterwarnings("ignore:steps are called")
@pytest.mark.parametrize(
    ("check", "plant", "told"),
    [
        ("replays", an_average_that_is_replaced, "ema: steps are called, not replayed"),
        ("waits", a_loss_that_the_host_reads, "the host waits"),
    ],
)
def test_the_first_checks_find_faults(stand_in, monkeypatch, check, plant, told):
    small = dataclasses.replace(first_gpu.SMALL, model="mlp", precision="float32")
    monkeypatch.setattr(first_gpu, "SMALL", small)
    monkeypatch.setattr(first_gpu, "WAYS", {"ema": {"ema": 0.9}})
    plant(monkeypatch, stand_in)
    with pytest.raises(AssertionError, match=told):
        first_gpu.CHECKS[check](torch.device("cuda", 0))


def test_a_stream_for_every_step_is_found(tmp_path, stand_in, monkeypatch):
    aside, captured = Graphs._call_aside, torch.cuda.graph

    def fresh(self, inputs):
        self._stream = torch.cuda.Stream(self._device)
        aside(self, inputs)

    monkeypatch.setattr(Graphs, "_call_aside", fresh)
    monkeypatch.setattr(torch.cuda, "graph", lambda g, pool, *_: captured(g, pool))
    with pytest.raises(AssertionError, match="handed out while it is in use"):
        many_runs(tmp_path)


def test_a_capture_on_the_stream_of_another_gpu_is_found(tmp_path, stand_in, monkeypatch):
    captured = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda g, pool, *_: captured(g, pool))
    run(SMALL, tmp_path / "first", device="cuda:0")
    with pytest.warns(UserWarning, match="a replay changes .* otherwise than a call"):
        run(SMALL, tmp_path / "second", device="cuda:1")


def test_a_device_without_its_index_is_found(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(DataSet, "device", property(lambda data: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "device_of", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match=r"a generator of|tensors of 2 devices"):
        run(SMALL, tmp_path, device="cuda:1")


def test_graphs_that_are_kept_are_found(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(Step, "close", lambda self: None)
    gc.disable()
    try:
        run(SMALL, tmp_path)
        assert stand_in.held() == 2
    finally:
        gc.enable()


def test_a_clock_that_is_read_too_soon_is_found(tmp_path, stand_in, monkeypatch):
    """What is copied to the host is the clock's only reason to be late."""
    usual, behind = stand_in.usual[0], []
    predict = training.predict

    def ask(*given, **named):
        out = predict(*given, **named)
        behind.append(usual.done - stand_in.host.get(id(usual), 0))
        return out

    monkeypatch.setattr(training, "predict", ask)
    run(SMALL, tmp_path)
    assert min(behind) > 0
