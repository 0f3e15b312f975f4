"""Train one network and record it: `train(config, folder) -> RunRecord`.

A run's folder holds `config.json`, `record.npz`, `probs.npy` (mapped, half precision) and
`checkpoints/epoch_NNNN.safetensors`; while it trains, its last two states as well. Everything
random in an epoch is drawn from the run's seed and the epoch's number, so that a run which was
killed goes on from its last complete epoch and, on the CPU, ends with the same bits.
"""

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fmnlib.config import InputError, Paused, RunConfig
from fmnlib.files import Batch
from fmnlib.record import RunRecord
from fmnlib.training import data as datasets
from fmnlib.training.background import Background
from fmnlib.training.checkpoint import checkpoint_path, lossless, pack, rounded
from fmnlib.training.dataset import Data, DataSet
from fmnlib.training.folder import alone, check_labels
from fmnlib.training.models import arithmetic, build, in_half
from fmnlib.training.parallel import ALONE, World, join, shared_batchnorm
from fmnlib.training.recorder import Recorder, Seen
from fmnlib.training.schedule import learning_rate
from fmnlib.training.state import clear, newest, restore, snapshot, under, write_state
from fmnlib.training.step import Criterion, Parts, Step, make_optimizer

__all__ = ["build_model", "evaluate", "pick_device", "predict", "train"]


def train(
    config: RunConfig,
    folder: Path,
    *,
    device: str = "auto",
    data: Data | None = None,
    criterion: Criterion | None = None,
    initial: Mapping[str, Tensor] | None = None,
    progress: bool = True,
    deadline: float = math.inf,
    graphs: bool = True,
) -> RunRecord:
    """Train a run, or go on with it, and return its record.

    A second process on the same folder waits until the first is done; processes that torchrun
    started train the run together.

    Args:
        config: What to train.
        folder: The run's own folder; made if need be.
        device: cpu, cuda or auto, which takes a GPU if there is one.
        data: The data set, if it is loaded already.
        criterion: Loss per sample; cross-entropy with the data's labels where not given.
        initial: Weights to start from; fresh ones of the run's seed where not given.
        progress: Show a bar.
        deadline: Stop at the end of the epoch after which `time.monotonic()` would pass this.
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
    world, place = join(pick_device(device))
    data = datasets.load(config, place) if data is None else data
    if len(data.labels) < 2:
        raise InputError(f"{config.dataset} gives {len(data.labels)} training samples; take more")
    criterion = criterion or _cross_entropy(data.labels, config.label_smoothing)
    with torch.device("meta"):  # a network that cannot be built leaves no folder behind
        _network(config, data)
    gpus = [place] if place.type == "cuda" else []
    with alone(config, folder, world), torch.random.fork_rng(gpus):
        if world.first:
            check_labels(folder, data.labels.cpu().numpy())
        if not (folder / "record.npz").exists():
            parts = _start(config, data, initial, world)
            step = Step(config, data, parts, criterion, world, graphs)
            recorder = Recorder(config, folder, data) if world.first else None
            first = _resume(folder, parts, recorder, world)
            epochs = tqdm(range(first, config.epochs), config.id, config.epochs, initial=first,
                          disable=not (progress and world.first))  # fmt: skip
            with (
                torch.backends.cudnn.flags(enabled=True, benchmark=True),
                Background(data.device) as background,
            ):
                _epochs(step, recorder, background, epochs, deadline)
            if recorder is not None:
                recorder.finish()
        if world.first:
            clear(folder)
        world.meet()
        return RunRecord.load(folder)


def pick_device(device: str) -> torch.device:
    """A device by name; auto is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("meta holds no numbers")
        return found
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {device!r}, which is not here; use cpu or auto") from error


def build_model(config: RunConfig, data: Data) -> nn.Module:
    """The network of a run, with fresh weights of its seed, on its data's device."""
    torch.manual_seed(config.seed)
    return _network(config, data).to(data.device).to(memory_format=torch.channels_last)


def _network(config: RunConfig, data: Data) -> nn.Module:
    channels, side, _ = data.shape
    shape = {"classes": data.classes, "channels": channels, "side": side}
    return build(config.model, **shape, width=config.width)


@torch.no_grad()
def predict(model: nn.Module, data: DataSet, images: Tensor, precision: str = "auto") -> Tensor:
    """Logits `[samples, classes]` of uint8 images, in evaluation mode."""
    model.eval()
    with arithmetic(precision, images.device):
        batches = images.split(_eval_batch(images.device))
        return torch.cat([model(data.normalize(part)).float() for part in batches])


def _start(
    config: RunConfig, data: Data, initial: Mapping[str, Tensor] | None, world: World
) -> Parts:
    model = build_model(config, data)
    if initial is not None:
        model.load_state_dict(initial)
    model = shared_batchnorm(model, world)
    ema = copy.deepcopy(model) if config.ema else model
    return Parts(model, make_optimizer(config, model), ema)


def _resume(folder: Path, parts: Parts, recorder: Recorder | None, world: World) -> int:
    """Load the last complete epoch, if there is one; return the epoch to go on with."""
    if not world.first:
        world.meet()
    found = newest(folder)
    if world.first:  # it alone has set aside what is damaged
        world.meet()
    epoch, tensors = found or (-1, {})
    if world.agree(float(epoch)) != epoch:
        raise InputError(f"the processes read different states in {folder}; run again")
    if tensors:
        restore(parts, tensors)
    if tensors and recorder is not None:
        recorder.restore(under(tensors, "record."), epoch)
    return epoch + 1


def _epochs(
    step: Step,
    recorder: Recorder | None,
    background: Background,
    epochs: "tqdm[int]",
    deadline: float,
) -> None:
    """Train epoch by epoch; what each showed is written while the next one trains."""
    config, data, parts, world = step.config, step.data, step.parts, step.world
    halved = rounded(parts.model) if in_half(config.precision, data.device) else frozenset()
    before = time.monotonic()
    for epoch in epochs:
        lr = _train_epoch(step, epoch)
        logits = evaluate(parts.ema, data, config.precision, world)
        losses, right = world.gather(step.losses.clone()), world.gather(step.right.long()) > 0
        now = time.monotonic()
        seen = Seen(logits, losses, right, lr, now - before)
        if recorder is not None:
            background.do(_writing(recorder, epoch, seen, snapshot(parts), halved))
        late = world.agree(float(2 * now - before > deadline))  # each has a clock of its own
        if late and epoch + 1 < config.epochs:
            background.wait()
            told = f"{config.id} paused after {epoch + 1} of {config.epochs} epochs"
            raise Paused(f"{told}; the same command goes on")
        before = now


def _writing(
    recorder: Recorder,
    epoch: int,
    seen: Seen,
    tensors: dict[str, Tensor],
    halved: Collection[str],
) -> Callable[[], Callable[[], None]]:
    """The job of writing an epoch to disk, which leaves the waiting for the disk to be done."""
    folder = recorder.folder

    def write() -> Callable[[], None]:
        files = Batch()
        recorder.note(epoch, seen, files)
        held = {name: tensor.cpu() for name, tensor in tensors.items()}
        if epoch in recorder.kept:
            weights = under(held, "ema.") or under(held, "model.")
            files.write(checkpoint_path(folder, epoch), pack(lossless(weights, halved), {}))
        held |= {f"record.{name}": value for name, value in recorder.tensors().items()}
        write_state(folder, held, epoch, files)
        return files.settle

    return write


def _train_epoch(step: Step, epoch: int) -> float:
    """One pass over the training data; the learning rate of its last step."""
    config, data = step.config, step.data
    seed, samples = _mixed_seed(config.seed, epoch), len(data.labels)
    generator = torch.Generator(data.device).manual_seed(seed)
    order = torch.randperm(samples, generator=generator, device=data.device)
    steps = min(math.ceil(samples / config.batch_size), samples // 2)  # no batch of one sample
    batches = order.tensor_split(steps)
    parts = [step.world.part(index) for index in batches]
    step.begin(seed)
    lr = math.nan
    for number, (index, images) in enumerate(
        zip(parts, data.views(parts, config.augment, seed + 2**40), strict=True)
    ):
        lr = learning_rate(config, (epoch + number / len(batches)) / config.epochs)
        step(images, index, lr)
    return lr


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, precision: str = "auto", world: World = ALONE
) -> Tensor:
    """Logits of the evaluation images `[samples, classes]`, each process its part."""
    model.eval()
    samples = len(data.eval_labels)
    logits = torch.zeros(samples, data.classes, device=data.device)
    batches = world.part(torch.arange(samples, device=data.device)).split(_eval_batch(data.device))
    with arithmetic(precision, data.device):
        for index, images in zip(batches, data.eval_views(batches), strict=True):
            logits[index] = model(images).float()
    return world.gather(logits)


def _eval_batch(device: torch.device) -> int:
    return 2500 if device.type == "cuda" else 1000


def _cross_entropy(labels: Tensor, smoothing: float) -> Criterion:
    return lambda logits, _, index: F.cross_entropy(
        logits, labels[index], reduction="none", label_smoothing=smoothing
    )


def _mixed_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch
