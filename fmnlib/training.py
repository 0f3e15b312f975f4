"""Train one network and record it: `train(config, folder) -> RunRecord`.

A run's folder holds `config.json`, `record.npz`, `probs.npy` (mapped, half precision) and
`checkpoints/epoch_NNNN.safetensors`; while it trains, its last two states as well. Everything
random in an epoch is drawn from the run's seed and the epoch's number, so that a run which was
killed resumes after its last complete epoch and, on the CPU, ends with the same bits.
"""

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmnlib import checkpoint, models
from fmnlib.config import TAIL, InputError, Paused, RunConfig
from fmnlib.data import DataSet, apply_crop_flip, load
from fmnlib.images import ImageFiles
from fmnlib.losses import Memory, begin_epoch, new_memory, sample_losses
from fmnlib.models import State, autocast
from fmnlib.parallel import SINGLE_PROCESS, World, join, synchronize_batchnorm
from fmnlib.record import RunRecord
from fmnlib.recorder import Background, EpochOutputs, Recorder
from fmnlib.step import Criterion, Step, TrainingState, make_optimizer, make_scaler

if sys.platform != "win32":
    import resource

Build = Callable[[], nn.Module]  # makes a network with fresh weights
WARMUP_START = 0.01  # share of the peak learning rate
_LONG = 60  # seconds; a run that takes longer says so after its first epoch


def train(
    config: RunConfig,
    folder: Path,
    *,
    device: str = "auto",
    data: DataSet | None = None,
    criterion: Criterion | None = None,
    build: Build | None = None,
    initial: State | None = None,
    progress: bool = True,
    deadline: float = math.inf,
    graphs: bool = True,
) -> RunRecord:
    """Train a run, or resume it, and return its record.

    A second process on the same folder waits until the first is done; processes that torchrun
    started train the run together.

    Args:
        config: What to train.
        folder: The run's own folder; created if it does not exist.
        device: cpu, cuda or auto, which takes a GPU if there is one.
        data: The data set, if it is loaded already.
        criterion: Loss per sample; by default the config's loss on the data's labels.
        build: Creates the network; by default that of the config.
        initial: Weights to start from; by default new ones, drawn with the run's seed.
        progress: Show a progress bar.
        deadline: Value of `time.monotonic()` by which to stop, at the end of an epoch.
        graphs: Replay steps as CUDA graphs, on a GPU.

    Raises:
        InputError: If the folder is another run's, or the loss stops being finite.
        Paused: If the run stopped for the deadline.

    >>> import tempfile
    >>> config = RunConfig(model="mlp", epochs=2, train_samples=64, eval_samples=32)
    >>> record = train(config, Path(tempfile.mkdtemp()), device="cpu", progress=False)
    >>> record.probs.shape
    (2, 32, 10)
    """
    if config.teacher and criterion is None:
        raise InputError(f"teacher is {config.teacher!r} in a plain run; students: `fmn distill`")
    if config.loss != "cross_entropy" and criterion is not None:
        raise InputError(f"loss is {config.loss!r} beside a criterion; leave one of them out")
    world, place = join(pick_device(device))
    data = load(config, place) if data is None else data
    if len(data.labels) < 2:
        raise InputError(f"{config.dataset} gives {len(data.labels)} training samples; take more")
    memory = new_memory(config, data.labels, data.classes)
    if memory is not None and world.size > 1:
        problem = f"loss is {config.loss!r}, which remembers samples, on {world.size} processes"
        raise InputError(f"{problem}; use one process, or gce or sce")
    if build is None:
        _check_network(config, data)  # one that does not fit leaves no folder behind
    gpus = [data.device] if data.device.type == "cuda" else []
    with checkpoint.run_lock(config, folder, world), torch.random.fork_rng(gpus):
        if world.first:
            checkpoint.check_labels(folder, data.labels.cpu().numpy())
        if not (folder / "record.npz").exists():
            parts = dataclasses.replace(
                _initialize(config, data, build, initial, world), memory=memory
            )
            loss = criterion or _criterion(config, data, memory)
            step = Step(config, data, parts, loss, world, graphs)
            recorder = Recorder(config, folder, data, parts.model) if world.first else None
            first = _resume(folder, parts, recorder, world)
            name = config.id if build is None else "distilling"  # the id names the config's model
            epochs = tqdm(range(first, config.epochs), name, config.epochs, initial=first,
                          disable=not (progress and world.first))  # fmt: skip
            with (
                torch.backends.cudnn.flags(enabled=True, benchmark=True),
                torch.cuda.device_of(data.labels),
                closing(step),
                Background(data.device) as background,
            ):
                _epochs(step, recorder, background, epochs, deadline)
            if recorder is not None:
                recorder.finish()
        if world.first:  # also of a run that was killed once its record was there
            checkpoint.clear_states(folder)
            if config.keep_best:  # the record holds what is kept
                (folder / "probs.npy").unlink(missing_ok=True)
        world.barrier()
        record = RunRecord.load(folder)
        if not np.array_equal(record.labels, data.eval_labels.cpu().numpy()):
            problem = f"{folder} was evaluated on other labels than its settings give now"
            raise InputError(f"{problem}; move it away, or bring the old labels back")
        return record


def pick_device(device: str) -> torch.device:
    """A device by name; auto is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.empty(0, device=device).device
        if chosen.type == "meta":
            raise RuntimeError("meta holds no numbers")
        return chosen
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {device!r}, which is not here; use cpu or auto") from error


def build_model(config: RunConfig, data: DataSet, build: Build | None = None) -> nn.Module:
    """The network of a run, with fresh weights of its seed, on its data's device."""
    with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model = _network(config, data) if build is None else build()
    return model.to(data.device).to(memory_format=torch.channels_last)


@torch.no_grad()
def predict(
    model: nn.Module,
    data: DataSet,
    images: Tensor | ImageFiles,
    precision: str = "auto",
    transforms: Tensor | None = None,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """Logits `[samples, classes]` of uint8 images, in evaluation mode.

    Args:
        model: The network.
        data: The data set of the images.
        images: `[samples, channels, side, side]`, or their files.
        precision: As in `RunConfig`.
        transforms: Crops and flips of the images, as `sample_crop_flip` draws them.
        world: Processes each of which predicts a shard of the images.
    """
    model.eval()
    samples = len(images)
    logits = torch.zeros(samples, data.classes, device=data.device)
    every = torch.arange(samples, device=data.device)
    batches = world.shard(every).split(_eval_batch_size(data))
    with autocast(precision, data.device):
        for index, batch in zip(batches, data.gather(images, batches), strict=True):
            if transforms is not None:
                batch = apply_crop_flip(batch, transforms[:, index])
            logits[index] = model(data.normalize(batch)).float()
    return world.all_reduce(logits)


def learning_rate(config: RunConfig, done: float) -> float:
    """The learning rate after `done` of the run, a share from 0 to 1.

    It rises linearly in the warm-up, then follows `config.schedule`: cosine falls to 0 along a
    cosine; step divides by 10 at 1/2 and 3/4 of the run; constant stays;
    cyclic repeats `config.cycles` cosines. constant_tail and cyclic_tail halve the rate along a
    cosine until `TAIL` of the run; then constant_tail keeps it, and cyclic_tail repeats cosines.

    >>> [learning_rate(RunConfig(lr=1.0), done) for done in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    warmup = config.warmup / config.epochs
    if done < warmup:
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * done / warmup)
    done = (done - warmup) / (1 - warmup)
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 1 / 2) + (done >= 3 / 4))
    if config.schedule == "constant":
        return config.lr
    high, low = config.lr, 0.0
    if config.schedule == "cyclic":
        done = done * config.cycles % 1
    elif config.schedule.endswith("tail"):
        middle, tail = config.lr / 2, (done - TAIL) / (1 - TAIL)
        if tail < 0:
            low, done = middle, done / TAIL
        elif config.schedule == "constant_tail":
            return middle
        else:
            high, done = middle, tail * config.cycles % 1
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


def _check_network(config: RunConfig, data: DataSet) -> None:
    """Refuse a network that cannot be built or does not take the images."""
    side = data.shape[-1]
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]), torch.no_grad():
                _network(config, data).eval()(torch.zeros(2, *data.shape))
            return
        except InputError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            if device == "meta" and isinstance(error, NotImplementedError):
                continue  # a constructor reads numbers, as RegNet's does: meta has none
            reason = str(error).partition("\n")[0]
            problem = f"{config.model} takes no images of {side} x {side} pixels ({reason})"
            raise InputError(f"{problem}; give another image_size or model") from error


def _network(config: RunConfig, data: DataSet) -> nn.Module:
    channels, side, _ = data.shape
    shape = {"classes": data.classes, "channels": channels, "side": side}
    return models.build(config.model, **shape, width=config.width)


def _initialize(
    config: RunConfig, data: DataSet, build: Build | None, initial: State | None, world: World
) -> TrainingState:
    model = build_model(config, data, build)
    if initial is not None:
        model.load_state_dict(initial)
    model = synchronize_batchnorm(model, world)
    ema = copy.deepcopy(model) if config.ema else model
    scaler = make_scaler(config, data.device)
    return TrainingState(model, make_optimizer(config, model), ema, scaler)


def _resume(folder: Path, parts: TrainingState, recorder: Recorder | None, world: World) -> int:
    """Load the last complete epoch, if there is one; return the epoch to go on with."""
    if not world.first:
        world.barrier()
    epoch, tensors = checkpoint.newest_state(folder) or (-1, {})
    if world.first:  # only the first process renames damaged files; the others wait for it
        world.barrier()
    if world.broadcast(float(epoch)) != epoch:
        raise InputError(f"the processes read different states in {folder}; run again")
    if tensors:
        checkpoint.restore(parts, tensors)
    if tensors and recorder is not None:
        recorder.restore(checkpoint.strip_prefix(tensors, "record."), epoch)
    return epoch + 1


def _epochs(
    step: Step,
    recorder: Recorder | None,
    background: Background,
    epochs: "tqdm[int]",
    deadline: float,
) -> None:
    """Train epoch by epoch; each is written while the next one trains."""
    config, data, parts, world = step.config, step.data, step.parts, step.world
    before = time.monotonic()
    for epoch in epochs:
        lr = _train_epoch(step, epoch)
        logits = predict(parts.ema, data, data.eval_images, config.precision, world=world)
        losses = world.all_reduce(step.losses.clone()).cpu()
        right = (world.all_reduce(step.right.long()) > 0).cpu()
        logits, now = logits.cpu(), time.monotonic()  # after the GPU has finished
        outputs = EpochOutputs(logits, losses, right, lr, now - before)
        if recorder is not None:
            left = (config.epochs - epoch - 1) * (now - before)
            if left > _LONG and not epochs.disable and epoch == epochs.initial:
                tqdm.write(_forecast(left, recorder.disk, data.device), sys.stderr)
            background.do(recorder.writing(epoch, outputs, checkpoint.snapshot(parts)))
        late = world.broadcast(float(2 * now - before > deadline))  # clocks of processes differ
        if late and epoch + 1 < config.epochs:
            background.wait()
            paused = f"{config.id} paused after {epoch + 1} of {config.epochs} epochs"
            raise Paused(f"{paused}; the same command resumes it")
        before = now


def _forecast(seconds: float, disk: int, device: torch.device) -> str:
    """Remaining time, disk space and memory of a run, as a text, after its first epoch."""
    text = f"about {seconds / 60:.0f} minutes more, {disk / 1e9:.2f} GB on the disk"
    if device.type == "cuda":
        return f"{text}, {torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB on the GPU"
    if sys.platform == "win32":
        return text
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB, on macOS in bytes
    return f"{text}, {peak * (1 if sys.platform == 'darwin' else 1000) / 1e9:.1f} GB of memory"


def _train_epoch(step: Step, epoch: int) -> float:
    """Train for one epoch; return the learning rate of its last step."""
    config, data = step.config, step.data
    seed, samples = config.seed * 1_000_003 + epoch, len(data.labels)
    generator = torch.Generator(data.device).manual_seed(seed)
    order = torch.randperm(samples, generator=generator, device=data.device)
    steps = min(math.ceil(samples / config.batch_size), samples // 2)  # no batch of one sample
    shards = [step.world.shard(index) for index in order.tensor_split(steps)]
    step.begin(seed)
    if step.parts.memory is not None:
        begin_epoch(config, step.parts.memory, epoch)
    lr = math.nan
    for number, batch in enumerate(data.batches(shards, config.augment, seed + 2**40)):
        lr = learning_rate(config, (epoch + number / steps) / config.epochs)
        step(batch, lr)
    return lr


def _eval_batch_size(data: DataSet) -> int:
    """Batch size for prediction: large for images in memory, small for images in files."""
    if isinstance(data.eval_images, ImageFiles):
        return 256
    return 2500 if data.device.type == "cuda" else 1000


def _criterion(config: RunConfig, data: DataSet, memory: Memory | None) -> Criterion:
    return lambda logits, batch: sample_losses(
        config, logits, data.labels[batch.index], batch.index, memory
    )
