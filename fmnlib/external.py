"""Networks that were trained elsewhere: run their checkpoints, fuse them, write one network."""

import contextlib
import copy
import dataclasses
import filecmp
import functools
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from fmnlib import models, training, weights
from fmnlib.checkpoint import checkpoint_path, load_tensors
from fmnlib.config import SOFT_SHARES, CheckpointFiles, InputError, RunConfig, StudentConfig
from fmnlib.data import DataSet
from fmnlib.distillation import Teacher, soft_target_loss, teacher_criterion
from fmnlib.files import refuse_existing, write_whole
from fmnlib.fusion import Fusion, Search, best_epochs
from fmnlib.images import ImageFiles, Preprocessing, open_folder
from fmnlib.labels import TrainingSamples, read_images
from fmnlib.parallel import has_batchnorm
from fmnlib.record import RunRecord
from fmnlib.scores import at_chance
from fmnlib.stats import gain_rows, gains, paired_gain, picks
from fmnlib.tracker import load_tracked
from fmnlib.watch import forward, labels_of, predict_batches

Maker = Callable[[], nn.Module]
Members = Sequence[tuple[Path, float]]  # checkpoints of a mixture, and their weights


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Labelled inputs of any kind, in the same order in each pass."""

    #: Begins a pass over batches, as `fmnlib.watch.predict_batches` takes them
    read: Callable[[], Iterable[Any]]
    labels: np.ndarray  #: True classes `[samples]`
    classes: list[str]  #: Names of the classes; empty where nothing gives them
    #: The files of a folder of images; None for the batches of a function
    images: ImageFiles | None = None


def fuse_files(
    files: CheckpointFiles, search: Search, split: int, tracked: Path | None = None
) -> dict[str, Any]:
    """Run checkpoints on data, fuse them, write one network, and report what that gains.

    If `tracked` is given, checkpoints and predictions are those of this `Tracker`'s folder. The
    search chooses on the validation half of the split. The report holds, by name, test accuracies,
    gains with intervals, picks and the files written. An `InputError` if a file or folder is
    missing, does not fit, or would be overwritten.
    """
    mixture_file = _check_outputs(files)
    opened = _open(files, search, split, tracked)
    data, train, make, device = opened.data, opened.train, opened.make, opened.device
    normalized = has_batchnorm(opened.network)
    if normalized and train is None and (data is None or not data.images):
        raise InputError("the model has BatchNorm, to be estimated anew; give --train")
    named = False
    if normalized and train is not None and train.images is None:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws
            named = isinstance(next(iter(train.read())), Mapping)
    if named and files.network == "averaged":  # before the long work
        raise InputError("the model has BatchNorm; give batches as pairs (inputs, labels)")
    common: Any = {"device": device, "kind": files.weights}
    with tempfile.TemporaryDirectory() as folder:
        record = opened.record or _record(opened, files, Path(folder))
        if files.save_record is not None:
            record.save(files.save_record)
        val, test = record.split(split)
        assert val.index is not None
        fusion, val_data = search(val), data and _take(data, val.index)
        members = _members(opened.paths, fusion)

        def averaged(members: Members) -> nn.Module:
            batches = _inputs(train or val_data, device) if normalized else ()
            return average_checkpoints(make, members, batches, **common)

        if files.network == "averaged":
            written = averaged(members)
        else:
            assert train is not None
            extra: Any = {"epochs": files.epochs, "lr": files.lr, "labels": files.labels} | common
            written = distill_checkpoints(make, members, train, val_data, **extra)
        weights.write_state_dict(files.output, written.state_dict())
        names = weights.checkpoint_names(opened.paths)
        mixture = {"checkpoints": names, "weights": fusion.weights.tolist()}
        report: dict[str, Any] = {"checkpoints": len(names), "first": names[0], "final": names[-1]}
        if data is not None and data.images is not None:
            mixture |= {"classes": data.classes, "preprocessing": str(opened.preprocessing)}
            samples = f"{len(record.labels)} of {len(data.classes)} classes"
            report["images"] = f"{samples}; {opened.preprocessing}"
        write_whole(mixture_file, json.dumps(mixture, indent=1).encode())
        right: dict[str, np.ndarray] = {}
        if data is not None:
            networks: dict[str, nn.Module] = {files.network: written}
            best = weighted(opened.paths, best_epochs(val))
            if all(path.exists() for path, _ in best) and not named:
                networks[f"averaged, {len(best)} best"] = averaged(best)
            for name, network in networks.items():
                right[name] = _predict(network, data, device).argmax(1)[test.index] == test.labels
    report |= gain_rows(gains(val, test, fusion, right)) | picks(fusion, names)
    report["networks"] = fusion.networks
    if data is None:
        report[f"test accuracy, {files.network}"] = "not measured; give --data"
    return report | {"written": f"{files.output}, {mixture_file}"}


def mixture_on_training(
    files: CheckpointFiles, search: Search, split: int, tracked: Path | None = None
) -> tuple[TrainingSamples, Fusion]:
    """Mix checkpoints as validation samples choose, and run the mixture on the training samples.

    Arguments and errors are as in `fuse_files`.
    """
    opened = _open(files, search, split, tracked)
    if (train := opened.train) is None:
        raise InputError("--train is missing; give the training samples, whose labels are ranked")
    with tempfile.TemporaryDirectory() as folder:
        record = opened.record or _record(opened, files, Path(folder))
        fusion = search(record.split(split)[0])
    members, kind = _members(opened.paths, fusion), files.weights
    networks = ((_loaded(opened.make, path, kind), weight) for path, weight in members)
    mixed = sum(weight * _predict(network, train, opened.device) for network, weight in networks)
    samples = TrainingSamples(probs=np.asarray(mixed), given=train.labels)
    if (images := train.images) is not None:
        read = functools.partial(read_images, images)
        samples = dataclasses.replace(
            samples, files=images.names, classes=images.classes, images=read
        )
    return samples, fusion


def open_labelled(source: Path, preprocessing: Preprocessing) -> Labelled:
    """A folder of images, or the batches that a function FILE.py:FUNCTION returns.

    An `InputError` if it is neither, or the batches hold no labels or are read once.
    """
    if ".py:" in str(source):
        batches = _function(str(source), "data")()
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            kind = type(batches).__name__
            raise InputError(f"{source} returned a {kind}; return a DataLoader or a list")
        try:
            labels = labels_of(batches)
        except InputError as error:
            raise InputError(f"of {source}, {error}") from error
        if not len(labels):
            raise InputError(f"{source} returned no batch; return batches of inputs and labels")
        return Labelled(lambda: batches, labels, [])
    return _of_images(open_folder(source, preprocessing))


def maker(name: str, *, classes: int, preprocessing: Preprocessing) -> Maker:
    """A function that creates the network called `name`, with newly initialised weights.

    The name is torchvision:NAME, timm:NAME, another one of `fmn train --model`, or
    FILE.py:FUNCTION, a function of yours that takes no argument; it is run.
    """
    channels, side = len(preprocessing.mean), preprocessing.size
    if ".py" in name and not name.startswith("timm:"):
        own = _function(name, "model")
        if not isinstance(network := own(), nn.Module):
            raise InputError(f"{name} returned a {type(network).__name__}; return the network")
        return lambda: copy.deepcopy(own())  # it may return the same object each time

    def make() -> nn.Module:
        if name.startswith("timm:"):
            return _from_timm(name.removeprefix("timm:"), classes, channels)
        try:
            return models.build(name, classes=classes, channels=channels, side=side)
        except InputError as error:
            raise InputError(f"{error}; or give timm:NAME or FILE.py:FUNCTION") from error

    return make


def record_checkpoints(
    model: nn.Module,
    paths: Sequence[Path],
    data: Labelled,
    folder: Path,
    *,
    device: torch.device,
    kind: weights.Kind = "model",
) -> RunRecord:
    """Run checkpoints on labelled data and record their predictions, one "epoch" per checkpoint.

    The files are in the order of training; their weights are loaded into `model` one by one.
    Probabilities are memory-mapped from a file in `folder`.
    """
    predicted: list[np.ndarray] = []
    for path in tqdm(paths, "predicting", unit="checkpoint"):
        network = weights.load_weights(model, weights.read_state_dict(path, kind), str(path))
        rows = _predict(network, data, device, str(path))
        if not predicted:
            shape = (len(paths), *rows.shape)
            probs = open_memmap(folder / "probs.npy", "w+", np.float16, shape)
        probs[len(predicted)] = rows
        predicted.append(rows.argmax(1).astype(np.int32))  # before float16 makes ties
    named = {"classes": data.classes} if data.classes else {}
    return RunRecord(
        labels=data.labels,
        predicted=np.array(predicted),
        kept=np.arange(len(paths)),
        probs=probs,
        classes=probs.shape[2],
        provenance={"checkpoints": weights.checkpoint_names(paths)} | named,
        ids=None if data.images is None else np.array(data.images.names),
    )


def weighted(paths: Sequence[Path], fusion: Fusion) -> list[tuple[Path, float]]:
    """The checkpoints that have weight in a fusion, and their weights."""
    return [(path, float(w)) for path, w in zip(paths, fusion.weights, strict=True) if w]


def average_checkpoints(
    make: Maker,
    members: Members,
    batches: Iterable[Tensor],
    *,
    device: torch.device | str = "cpu",
    kind: weights.Kind = "model",
) -> nn.Module:
    """The network with the weighted mean of the checkpoints' weights ("Averaged KF").

    Members are as `weighted` returns them; BatchNorm's statistics are re-estimated on the batches.
    """
    states = ((_loaded(make, path, kind).state_dict(), weight) for path, weight in members)
    return models.load_average(make().to(device), states, batches)


def distill_checkpoints(
    make: Maker,
    members: Members,
    train: Labelled,
    val: Labelled | None = None,
    *,
    epochs: int = 10,
    lr: float = 0.01,
    labels: Literal["given", "refined"] = "given",
    device: torch.device | str = "cpu",
    kind: weights.Kind = "model",
) -> nn.Module:
    """Train a student on the mixture of `members`, as `weighted` returns them.

    It starts from the checkpoint with the largest weight and minimises the loss of
    `fmnlib.distillation.distill` by SGD with the peak rate `lr`. Images are not augmented, and the
    mixture predicts them once; other inputs may be shuffled and are predicted in every pass.
    """
    teacher = [(_loaded(make, path, kind).to(device), weight) for path, weight in members]
    heaviest = max(members, key=lambda member: member[1])[0]
    student = _loaded(make, heaviest, kind).to(device)
    share = SOFT_SHARES[labels]
    settings = StudentConfig(teacher="checkpoints", labels=labels, soft_share=share)
    config = RunConfig(epochs=epochs, lr=lr, keep_every=epochs, student=settings)
    if train.images is None:
        return _distill_batches(student, teacher, train, config)
    images, eval_images = train.images, (val or train).images or train.images
    targets, eval_labels = (torch.from_numpy(x.labels).to(device) for x in (images, eval_images))
    data = DataSet(
        images=images.on(device),
        labels=targets,
        flipped=torch.zeros_like(targets, dtype=torch.bool),
        eval_images=eval_images.on(device),
        eval_labels=eval_labels,
        classes=len(images.classes),
        mean=torch.tensor(images.preprocessing.mean, device=device),
        std=torch.tensor(images.preprocessing.std, device=device),
    )
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            config,
            Path(folder),
            device=str(device),
            data=data,
            criterion=teacher_criterion(config, data, teacher),
            build=make,
            initial=student.state_dict(),
        )
        student.load_state_dict(load_tensors(checkpoint_path(Path(folder), epochs - 1)))
    return student.eval()


def _loaded(make: Maker, path: Path, kind: weights.Kind) -> nn.Module:
    return weights.load_weights(make(), weights.read_state_dict(path, kind), str(path))


def _distill_batches(
    student: nn.Module, teacher: Teacher, train: Labelled, config: RunConfig
) -> nn.Module:
    assert config.student is not None
    device = next(student.parameters()).device
    networks = [(functools.partial(forward, net, device=device), w) for net, w in teacher]
    optimizer = torch.optim.SGD(student.parameters(), config.lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    student.train()
    for _ in tqdm(range(config.epochs), "distilling", unit="epoch"):
        for batch in train.read():
            probs = models.mix_probs(networks, batch)
            labels = torch.from_numpy(labels_of([batch])).to(device)
            logits = forward(student, batch, device)
            optimizer.zero_grad()
            soft_target_loss(logits, probs, labels, config.student).mean().backward()
            optimizer.step()
        schedule.step()
    return student.eval()


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Checkpoints and what they are run on, checked before the long work begins."""

    paths: list[Path]
    record: RunRecord | None  # of a tracked folder
    data: Labelled | None
    train: Labelled | None
    make: Maker
    network: nn.Module
    preprocessing: Preprocessing
    device: torch.device


def _open(files: CheckpointFiles, search: Search, split: int, tracked: Path | None) -> _Opened:
    if not files.model or (files.data is None and tracked is None):
        needed = "--checkpoints needs --model NAME and --data FOLDER of validation images"
        raise InputError(f"{needed}, or FILE.py:FUNCTION")
    if files.train is not None and files.data and files.train.resolve() == files.data.resolve():
        problem = f"data and train are both {files.data}"
        raise InputError(f"{problem}; a student that is taught on the test half proves nothing")
    fields = {name: getattr(files, name) for name in ("size", "resize", "mean", "std")}
    preprocessing, device = Preprocessing(**fields), training.pick_device(files.device)
    if tracked is None:
        record, paths = None, weights.find_checkpoints(files.checkpoints)
    else:
        record = load_tracked(tracked)
        paths = [checkpoint_path(tracked, epoch) for epoch in range(record.epochs)]
    trial = RunRecord.from_arrays(np.full((len(paths), 2, 2), 0.5), [0, 0])
    search(trial.split(split)[0])  # the seed or an option of the search may be refused
    data, train = (
        None if source is None else open_labelled(source, preprocessing)
        for source in (files.data, files.train)
    )
    _check_data(data, train, record)
    if record is not None:
        classes = record.classes
    else:
        assert data is not None
        classes = len(data.classes) or int(data.labels.max()) + 1
    make = maker(files.model, classes=classes, preprocessing=preprocessing)
    network = make()
    if (source := data or train) is not None:  # before the long work
        few = _take(source, np.arange(min(2, len(source.labels)))) or source
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(few.read()))
        _predict(network, Labelled(lambda: [batch], labels_of([batch]), source.classes), device)
    return _Opened(paths, record, data, train, make, network, preprocessing, device)


def _record(opened: _Opened, files: CheckpointFiles, folder: Path) -> RunRecord:
    """Record the checkpoints' predictions for the validation samples, stored in a folder."""
    data, model, device, kind = opened.data, opened.network, opened.device, files.weights
    assert data is not None
    record = record_checkpoints(model, opened.paths, data, folder, device=device, kind=kind)
    if at_chance(record.predicted, record.labels):
        problem = f"no checkpoint is better than chance, {record.accuracy.max():.1%} at best"
        raise InputError(f"{problem}; check --size, --mean, --std and the order of class folders")
    best = weights.read_state_dict(opened.paths[int(record.accuracy.argmax())], kind)
    _refuse_foreign_batchnorm(weights.load_weights(model, best), data, record, device)
    return record


def _of_images(images: ImageFiles) -> Labelled:
    """Images as the network takes them, in order; decoded once where they fit in memory."""
    loaded = functools.cache(images.load)

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(images)).tensor_split(math.ceil(len(images) / 100))
        batches = loaded().tensor_split(len(order)) if images.fits() else images.read(order)
        for index, batch in zip(order, batches, strict=True):
            labels = torch.from_numpy(images.labels[index.numpy()])
            yield images.preprocessing.normalize(batch), labels

    return Labelled(read, images.labels, images.classes, images)


def _inputs(source: Labelled | None, device: torch.device) -> Iterator[Tensor]:
    """Batches that BatchNorm is estimated on."""
    assert source is not None
    if source.images is not None:  # they are sorted by class: shuffle, so that batches mix classes
        order = torch.randperm(len(source.labels), generator=torch.Generator().manual_seed(0))
        source = _of_images(source.images[order.numpy()])
    for batch in source.read():
        if isinstance(batch, Mapping):
            raise InputError("the model has BatchNorm; give batches as pairs (inputs, labels)")
        yield batch[0].to(device)


def _take(data: Labelled, index: np.ndarray) -> Labelled | None:
    """A subset of the images; None for the batches of a function, which cannot be indexed."""
    return None if data.images is None else _of_images(data.images[index])


def _predict(
    model: nn.Module, data: Labelled, device: torch.device, name: str = "the network"
) -> np.ndarray:
    """Probabilities `[samples, classes]` of a model on data."""
    try:
        logits, labels = predict_batches(model.to(device), data.read())
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        problem = f"the model gives no logits for these inputs ({reason})"
        raise InputError(f"{problem}; check their size and the number of means") from error
    if not np.array_equal(labels.numpy(), data.labels):
        raise InputError("the data come in another order in each pass; use shuffle=False")
    if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() <= 1e-3:
        problem = f"{name} returns probabilities, not logits"
        raise InputError(f"{problem}; leave out its softmax, which has no weights")
    if not logits.isfinite().all():
        raise InputError(f"{name} predicts NaN: its training diverged; leave it out")
    if data.classes and logits.shape[1] != len(data.classes):
        problem = f"the model has {logits.shape[1]} outputs for {len(data.classes)} class folders"
        raise InputError(f"{problem}; give the data that it was trained on")
    return logits.softmax(1).numpy()


@functools.cache
def _imported(file: Path) -> ModuleType:
    """A Python file as a module; it finds the modules beside it, as when run by itself."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)  # so that workers of a DataLoader find its classes
    spec.loader.exec_module(module)
    return module


def _function(name: str, what: str) -> Callable[[], Any]:
    """The function FILE.py:FUNCTION; the file is imported once."""
    file, _, function = name.rpartition(":")
    if name.endswith(".py"):
        raise InputError(f"{what} is {name!r}, which function of it? Give {name}:FUNCTION")
    if not Path(file).is_file():
        raise InputError(f"{what} is {name!r}, but {file} does not exist; give FILE.py:FUNCTION")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result of ours
            make = getattr(_imported(Path(file).resolve()), function, None)
    except Exception as error:  # whatever a file of the user's raises
        raise InputError(f"{file} cannot be imported ({error!r}); run it by itself") from error
    if not callable(make):
        raise InputError(f"{file} has no function {function!r}; give FILE.py:FUNCTION")

    def call() -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return make()
        except Exception as error:  # whatever a function of the user's raises
            returned = {"model": "the network"}.get(what, "batches of inputs and labels")
            problem = f"{name} cannot be called ({error!r}); it must need no argument"
            raise InputError(f"{problem}, and return {returned}") from error

    return call


def _from_timm(name: str, classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError("timm is not installed; `pip install timm`") from error
    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels)
    except RuntimeError as error:  # no such network
        raise InputError(f"timm makes no {name!r} ({error}); see timm.list_models()") from error


def _check_data(data: Labelled | None, train: Labelled | None, record: RunRecord | None) -> None:
    """Refuse data that do not go together."""
    if data is not None and record is not None and not np.array_equal(data.labels, record.labels):
        raise InputError("--data has other labels than the tracked samples; give these, in order")
    if record is not None and train is not None and train.images is not None:
        if (count := len(train.classes)) != record.classes:
            problem = f"{train.images.root} has {count} class folders"
            raise InputError(f"{problem} for {record.classes} tracked classes; make them equal")
    if data is None or train is None or data.images is None or train.images is None:
        return
    if train.classes != data.classes:
        roots = f"{data.images.root} and {train.images.root}"
        raise InputError(f"the classes in {roots} differ; make them equal")
    sizes: dict[int, list[Path]] = {}
    for name in train.images.names:
        file = train.images.root / name
        sizes.setdefault(file.stat().st_size, []).append(file)
    sample = data.images.names[:: 1 + len(data.labels) // 100]
    shared = [
        file.name
        for file in map(data.images.root.joinpath, sample)
        if any(filecmp.cmp(file, f, False) for f in sizes.get(file.stat().st_size, []))
    ]
    if len(shared) > len(sample) // 20:  # a few images may be equal by chance
        problem = f"{len(shared)} of {len(sample)} images of data, such as {shared[0]}"
        problem += ", are in train too"
        raise InputError(f"{problem}; a student that is taught on the test half proves nothing")


def _members(paths: Sequence[Path], fusion: Fusion) -> Members:
    """The members of a fusion, whose files are all there."""
    members = weighted(paths, fusion)
    if missing := [path.name for path, _ in members if not path.exists()]:
        problem = f"the mixture needs {', '.join(missing[:3])}, of {len(missing)} that are missing"
        raise InputError(f"{problem}; note the model with every epoch, and keep its checkpoints")
    return members


def _refuse_foreign_batchnorm(
    model: nn.Module, data: Labelled, record: RunRecord, device: torch.device
) -> None:
    """Refuse images that do not fit BatchNorm's statistics: another normalisation was used.

    `model` has the weights of the best checkpoint, whose statistics are the least likely to lag
    behind. The rule: re-estimating the statistics, on at most a thousand images, raises accuracy
    by more than 5 points with certainty (lower end of the interval).
    """
    index = np.sort(np.random.default_rng(0).permutation(len(record.labels))[:1000])
    subset = _take(data, index)
    if subset is None or not has_batchnorm(model):
        return
    update_bn(_inputs(subset, device), model.train())
    after = _predict(model.eval(), subset, device).argmax(1) == subset.labels
    before = record.correct[record.accuracy.argmax()][index]
    if paired_gain(after, before).low > 0.05:
        change = f"from {before.mean():.0%} to {after.mean():.0%}"
        problem = f"accuracy rises {change} when BatchNorm is estimated anew on these images"
        remedy = "give --mean, --std and --size of the training"
        raise InputError(f"{problem}; {remedy}, or if they are, --data FILE.py:FUNCTION")


def _check_outputs(files: CheckpointFiles) -> Path:
    """Check that all outputs can be written, before the long work; return the mixture's path."""
    if files.network == "distilled" and files.train is None:
        needed = "--network distilled needs --train"
        raise InputError(f"{needed}, a FOLDER of images or FILE.py:FUNCTION")
    for option in ("labels", "epochs", "lr"):
        value = getattr(files, option)
        if files.network != "distilled" and value != getattr(CheckpointFiles, option):
            raise InputError(f"--{option} {value} is for a student; give --network distilled, too")
    if files.save_record is not None and files.save_record.suffix != ".npz":
        raise InputError(f"save_record is {files.save_record}; give a name that ends in .npz")
    if files.output.suffix != ".safetensors":
        raise InputError(f"output is {files.output}; give a name that ends in .safetensors")
    mixture_file = files.output.with_suffix(".json")
    for path in filter(None, (files.output, mixture_file, files.save_record)):
        refuse_existing(path)
        parent = next(p for p in path.absolute().parents if p.exists())
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            problem = f"{path} cannot be written ({error.strerror})"
            raise InputError(f"{problem}; give another folder") from error
    return mixture_file
