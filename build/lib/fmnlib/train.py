"""Train one network and record it: `train(config, folder) -> RunRecord`.

A run's folder holds `config.json`, `record.npz`, `probs.npy` (mapped, half precision) and
`checkpoints/epoch_NNNN.safetensors`; while it trains, `state.safetensors` as well. Everything
random in an epoch is drawn from the run's seed and the epoch's number, so that a run which was
killed goes on from its last complete epoch and, on the CPU, ends with the same bits.
"""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fmnlib import data as datasets
from fmnlib.checkpoint import load_tensors, save_tensors
from fmnlib.config import TAIL, InputError, RunConfig
from fmnlib.data import DataSet
from fmnlib.models import build
from fmnlib.record import RunRecord, write_whole
from fmnlib.recorder import Recorder

__all__ = [
    "Criterion",
    "build_model",
    "checkpoint_path",
    "claim",
    "learning_rate",
    "pick_device",
    "predict",
    "train",
]

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss per sample from the logits, the images that gave them and the samples' indices."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What changes while a run trains; `ema` is the model itself where no average is kept."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module


def train(
    config: RunConfig,
    folder: Path,
    *,
    device: str = "auto",
    data: DataSet | None = None,
    criterion: Criterion | None = None,
    initial: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> RunRecord:
    """Train a run, or go on with it, and return its record.

    A second process on the same folder waits until the first is done.

    Args:
        config: What to train.
        folder: The run's own folder; made if need be.
        device: cpu, cuda or auto, which takes a GPU if there is one.
        data: The data set, if it is loaded already.
        criterion: Loss per sample; cross-entropy with the data's labels where not given.
        initial: Weights to start from; fresh ones of the run's seed where not given.
        progress: Show a bar.

    Raises:
        InputError: If the folder is another run's, or the loss stops being finite.

    >>> import tempfile
    >>> config = RunConfig(model="mlp", epochs=2, train_samples=64, eval_samples=32)
    >>> record = train(config, Path(tempfile.mkdtemp()), device="cpu", progress=False)
    >>> record.probs.shape
    (2, 32, 10)
    """
    if config.teacher and criterion is None:
        raise InputError(f"teacher is {config.teacher!r} in a plain run; students: `fmn distill`")
    data = datasets.load(config, pick_device(device)) if data is None else data
    labels = data.labels
    criterion = criterion or (lambda logits, _, index: _cross_entropy(logits, labels[index]))
    claim(folder, config)
    with FileLock(folder / ".lock"), torch.random.fork_rng():
        if (folder / "record.npz").exists():
            return RunRecord.load(folder)
        parts, recorder = _start(config, data, initial), Recorder(config, folder, data)
        first = _resume(folder, parts, recorder)
        show = tqdm(range(first, config.epochs), config.id, config.epochs, initial=first,
                    disable=not progress)  # fmt: skip
        for epoch in show:
            started = time.perf_counter()
            losses, right = _train_epoch(config, data, parts, epoch, criterion)
            logits = predict(parts.ema, data, data.eval_images)
            recorder.note(epoch, logits, losses, right, parts.optimizer.param_groups[0]["lr"])
            recorder.curves["seconds"][epoch] = time.perf_counter() - started
            if epoch in recorder.kept:
                save_tensors(checkpoint_path(folder, epoch), parts.ema.state_dict(), {})
            _save_state(folder, parts, recorder, epoch)
            show.set_postfix(accuracy=f"{recorder.accuracy(epoch):.1%}")
        record = recorder.finish()
        (folder / "state.safetensors").unlink(missing_ok=True)
        return record


def learning_rate(config: RunConfig, done: float) -> float:
    """The learning rate when a share of the run is done, from 0 to 1.

    >>> [learning_rate(RunConfig(lr=1.0), done) for done in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
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


def pick_device(device: str) -> torch.device:
    """A device by name; auto is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {device!r}, which is not here; use cpu or auto") from error


def build_model(config: RunConfig, data: DataSet) -> nn.Module:
    """The network of a run, with fresh weights of its seed, on its data's device."""
    torch.manual_seed(config.seed)
    _, channels, side, _ = data.images.shape
    shape = {"classes": data.classes, "channels": channels, "side": side}
    net = build(config.model, **shape, width=config.width)
    return net.to(data.images.device).to(memory_format=torch.channels_last)


@torch.no_grad()
def predict(model: nn.Module, data: DataSet, images: Tensor, batch: int = 1000) -> Tensor:
    """Logits `[samples, classes]` of uint8 images, in evaluation mode."""
    model.eval()
    with _autocast(images.device):
        return torch.cat([model(data.normalize(part)).float() for part in images.split(batch)])


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Where the weights after an epoch lie."""
    return folder / "checkpoints" / f"epoch_{epoch:04d}.safetensors"


def _train_epoch(
    config: RunConfig, data: DataSet, parts: _Parts, epoch: int, criterion: Criterion
) -> tuple[Tensor, Tensor]:
    """One pass over the training data; the loss and the hit or miss of each sample as seen."""
    device, samples = data.images.device, len(data.images)
    generator = torch.Generator(device).manual_seed(_mixed_seed(config.seed, epoch))
    torch.manual_seed(_mixed_seed(config.seed, epoch))  # dropout and the like
    order = torch.randperm(samples, generator=generator, device=device)
    losses, right = torch.empty(samples, device=device), torch.empty_like(order, dtype=torch.bool)
    batches = order.tensor_split(math.ceil(samples / config.batch_size))  # no tail of one sample
    parts.model.train()
    for step, index in enumerate(batches):
        lr = learning_rate(config, (epoch + step / len(batches)) / config.epochs)
        for group in parts.optimizer.param_groups:
            group["lr"] = lr
        images = data.augmented(index, config.augment, generator)
        with _autocast(device):
            logits = parts.model(images).float()
        loss = criterion(logits, images, index)
        parts.optimizer.zero_grad()
        loss.mean().backward()
        parts.optimizer.step()
        if parts.ema is not parts.model:
            _update_ema(parts.ema, parts.model, config.ema)
        losses[index] = loss.detach()
        right[index] = logits.detach().argmax(1) == data.labels[index]
    return losses, right


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _mixed_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _autocast(device: torch.device) -> torch.autocast:
    """Half precision on GPUs; on most CPUs it is slower than float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def _update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model; running statistics move too, counts are copied."""
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    averages, values = zip(*floating, strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)


def _start(config: RunConfig, data: DataSet, initial: Mapping[str, Tensor] | None) -> _Parts:
    model = build_model(config, data)
    if initial is not None:
        model.load_state_dict(initial)
    ema = copy.deepcopy(model) if config.ema else model
    if config.optimizer == "adamw":
        adamw = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
        return _Parts(model, adamw, ema)
    sgd = torch.optim.SGD(
        model.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    return _Parts(model, sgd, ema)


def claim(folder: Path, config: RunConfig) -> None:
    """Make the folder the run's own, or refuse to touch another run's."""
    file = folder / "config.json"
    if not file.exists():
        write_whole(file, json.dumps(dataclasses.asdict(config), indent=1).encode())
    elif RunConfig.load(file) != config:
        raise InputError(f"{folder} is the folder of another run; choose another folder")


def _save_state(folder: Path, parts: _Parts, recorder: Recorder, epoch: int) -> None:
    """Write everything that a restart needs; the epoch is complete once this file is there."""
    tensors = {f"record.{name}": value for name, value in recorder.tensors().items()}
    tensors |= {f"model.{name}": value for name, value in parts.model.state_dict().items()}
    if parts.ema is not parts.model:
        tensors |= {f"ema.{name}": value for name, value in parts.ema.state_dict().items()}
    for number, state in parts.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    save_tensors(folder / "state.safetensors", tensors, {"epoch": epoch})


def _resume(folder: Path, parts: _Parts, recorder: Recorder) -> int:
    """Load the last complete epoch, if there is one; return the epoch to go on with."""
    if not (folder / "state.safetensors").exists():
        return 0
    tensors, about = load_tensors(folder / "state.safetensors")

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    parts.model.load_state_dict(under("model."))
    if parts.ema is not parts.model:
        parts.ema.load_state_dict(under("ema."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in under("optimizer.").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    parts.optimizer.load_state_dict(parts.optimizer.state_dict() | {"state": state})
    recorder.restore(under("record."))
    return int(about["epoch"]) + 1
