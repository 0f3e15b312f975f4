"""Networks that were trained elsewhere: run their checkpoints, fuse them, write one network."""

import dataclasses
import filecmp
import functools
import importlib.util
import json
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
from fmnlib.labels import TrainingSamples, some_images
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

    The checkpoints and predictions may be those of a `Tracker`'s folder. The search is given the
    validation half, that the split draws. The report has test accuracies, gains with intervals,
    picks and files written, by name. An `InputError` if a file or folder is missing, does not fit,
    or would be overwritten.
    """
    mixture_file = _check_outputs(files)
    at = _open(files, search, split, tracked)
    data, train, make, device = at.data, at.train, at.make, at.device
    normalized = has_batchnorm(at.network)
    if normalized and train is None and (data is None or not data.images):
        raise InputError("the model has BatchNorm, to be estimated anew; give --train")
    where: Any = {"device": device, "kind": files.weights}
    with tempfile.TemporaryDirectory() as folder:
        record = at.record or _record(at, files, Path(folder))
        if files.save_record is not None:
            record.save(files.save_record)
        val, test = record.split(split)
        assert val.index is not None
        fusion, seen = search(val), data and _take(data, val.index)
        members = _members(at.paths, fusion)

        def averaged(members: Members) -> nn.Module:
            batches = _inputs(train or seen, device) if normalized else ()
            return average_checkpoints(make, members, batches, **where)

        if files.network == "averaged":
            written = averaged(members)
        else:
            assert train is not None
            options: Any = {"epochs": files.epochs, "lr": files.lr, "labels": files.labels} | where
            written = distill_checkpoints(make, members, train, seen, **options)
        weights.write_state_dict(files.output, written.state_dict())
        names = weights.checkpoint_names(at.paths)
        mixture = {"checkpoints": names, "weights": fusion.weights.tolist()}
        report: dict[str, Any] = {"checkpoints": len(names), "first": names[0], "final": names[-1]}
        if data is not None and data.images is not None:
            mixture |= {"classes": data.classes, "preprocessing": str(at.preprocessing)}
            samples = f"{len(record.labels)} of {len(data.classes)} classes"
            report["images"] = f"{samples}; {at.preprocessing}"
        write_whole(mixture_file, json.dumps(mixture, indent=1).encode())
        right: dict[str, np.ndarray] = {}
        if data is not None:
            networks: dict[str, nn.Module] = {files.network: written}
            best = weighted(at.paths, best_epochs(val))
            if all(path.exists() for path, _ in best):
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
    at = _open(files, search, split, tracked)
    if at.train is None:
        raise InputError("--train is missing; give the training samples, whose labels are ranked")
    with tempfile.TemporaryDirectory() as folder:
        record = at.record or _record(at, files, Path(folder))
        fusion = search(record.split(split)[0])
    networks = ((_loaded(at.make, p, files.weights), w) for p, w in _members(at.paths, fusion))
    mixed = sum(weight * _predict(network, at.train, at.device) for network, weight in networks)
    samples = TrainingSamples(probs=np.asarray(mixed), given=at.train.labels)
    if (images := at.train.images) is not None:
        read = functools.partial(some_images, images)
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
    """A function that makes the network of a name, with fresh weights.

    The name is torchvision:NAME, timm:NAME, another one of `fmn train --model`, or
    FILE.py:FUNCTION, a function of yours that takes no argument; it is run.
    """
    channels, side = len(preprocessing.mean), preprocessing.size
    if ".py" in name and not name.startswith("timm:"):
        own = _function(name, "model")
        if not isinstance(network := own(), nn.Module):
            raise InputError(f"{name} returned a {type(network).__name__}; return the network")
        return own

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
    """The record of checkpoints on labelled data; an "epoch" is a checkpoint.

    The files are in the order of training; the model takes the weights of one after the other.
    Probabilities are kept in a file in the folder, mapped, and not in memory.
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
    """The network of the mean weights of checkpoints ("Averaged KF"), as `weighted` gives them.

    BatchNorm's statistics are estimated again on the batches, inputs as the network takes them.
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
    """A student that learns from the mixture of checkpoints, as `weighted` gives them.

    It starts from the heaviest checkpoint and takes the loss of `fmnlib.distillation.distill`
    with these labels, by SGD with `lr` as the peak rate. Images are not augmented, and the
    mixture predicts them once; other inputs it predicts in every pass, since they may be shuffled.
    """
    teacher = [(_loaded(make, path, kind).to(device), weight) for path, weight in members]
    heaviest = max(members, key=lambda member: member[1])[0]
    student = _loaded(make, heaviest, kind).to(device)
    share = SOFT_SHARES[labels]
    settings = StudentConfig(teacher="checkpoints", labels=labels, soft_share=share)
    config = RunConfig(epochs=epochs, lr=lr, keep_every=epochs, student=settings)
    if train.images is None:
        return _distill_batches(student, teacher, train, config)
    images, seen = train.images, (val or train).images or train.images
    targets, seen_targets = (torch.from_numpy(x.labels).to(device) for x in (images, seen))
    data = DataSet(
        images=images.on(device),
        labels=targets,
        flipped=torch.zeros_like(targets, dtype=torch.bool),
        eval_images=seen.on(device),
        eval_labels=seen_targets,
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
    return _Opened(paths, record, data, train, make, make(), preprocessing, device)


def _record(at: _Opened, files: CheckpointFiles, folder: Path) -> RunRecord:
    """The checkpoints' predictions of the validation samples, held in a folder."""
    assert at.data is not None
    where: Any = {"device": at.device, "kind": files.weights}
    record = record_checkpoints(at.network, at.paths, at.data, folder, **where)
    if at_chance(record.predicted, record.labels):
        problem = f"no checkpoint is better than chance, {record.accuracy.max():.1%} at best"
        raise InputError(f"{problem}; check --size, --mean, --std and the order of class folders")
    best = weights.read_state_dict(at.paths[int(record.accuracy.argmax())], files.weights)
    _refuse_foreign_batchnorm(weights.load_weights(at.network, best), at.data, record, at.device)
    return record


def _of_images(images: ImageFiles) -> Labelled:
    """Images as the network takes them, in order; decoded once where they fit in memory."""
    loaded = functools.cache(images.load)

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(images)).split(100)
        batches = loaded().split(100) if images.fits() else images.read(order)
        for index, batch in zip(order, batches, strict=True):
            labels = torch.from_numpy(images.labels[index.numpy()])
            yield images.preprocessing.normalize(batch), labels

    return Labelled(read, images.labels, images.classes, images)


def _inputs(source: Labelled | None, device: torch.device) -> Iterator[Tensor]:
    """Batches that BatchNorm is estimated on."""
    assert source is not None
    if source.images is not None:  # in order of class, a batch would have the statistics of one
        order = torch.randperm(len(source.labels), generator=torch.Generator().manual_seed(0))
        source = _of_images(source.images[order.numpy()])
    for batch in source.read():
        if isinstance(batch, Mapping):
            raise InputError("the model has BatchNorm; give batches as pairs (inputs, labels)")
        yield batch[0].to(device)


def _take(data: Labelled, index: np.ndarray) -> Labelled | None:
    """Some of the images; None of the batches of a function, which are read whole."""
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
        make = getattr(_imported(Path(file).resolve()), function, None)
    except Exception as error:  # whatever a file of the user's raises
        raise InputError(f"{file} cannot be imported ({error!r}); run it by itself") from error
    if not callable(make):
        raise InputError(f"{file} has no function {function!r}; give FILE.py:FUNCTION")

    def call() -> Any:
        try:
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
    if data is None or train is None or data.images is None or train.images is None:
        return
    if train.classes != data.classes:
        roots = f"{data.images.root} and {train.images.root}"
        raise InputError(f"the classes in {roots} differ; make them equal")
    sizes: dict[int, list[Path]] = {}
    for name in train.images.names:
        file = train.images.root / name
        sizes.setdefault(file.stat().st_size, []).append(file)
    few = [data.images.root / name for name in data.images.names[:: 1 + len(data.labels) // 100]]
    same = [
        f.name
        for f in few
        if any(filecmp.cmp(f, g, False) for g in sizes.get(f.stat().st_size, []))
    ]
    if len(same) > len(few) // 20:  # a few pictures may be equal by chance
        problem = f"{len(same)} of {len(few)} images of data, such as {same[0]}, are in train too"
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
    """Refuse images on which BatchNorm's statistics are far off: normalised in another way.

    `model` has the weights of the best checkpoint, whose statistics are the least likely to lag
    behind. The rule: estimated anew, on at most a thousand images, they would bring 5 points of
    accuracy or more for certain.
    """
    few = np.sort(np.random.default_rng(0).permutation(len(record.labels))[:1000])
    some = _take(data, few)
    if some is None or not has_batchnorm(model):
        return
    update_bn(_inputs(some, device), model.train())
    known = _predict(model.eval(), some, device).argmax(1) == some.labels
    before = record.correct[record.accuracy.argmax()][few]
    if paired_gain(known, before).low > 0.05:
        change = f"from {before.mean():.0%} to {known.mean():.0%}"
        problem = f"accuracy rises {change} when BatchNorm is estimated anew on these images"
        remedy = "give --mean, --std and --size of the training"
        raise InputError(f"{problem}; {remedy}, or if they are, --data FILE.py:FUNCTION")


def _check_outputs(files: CheckpointFiles) -> Path:
    """Refuse outputs that cannot be written before the long work; the path of the second one."""
    if files.network == "distilled" and files.train is None:
        needed = "--network distilled needs --train"
        raise InputError(f"{needed}, a FOLDER of images or FILE.py:FUNCTION")
    if files.labels == "refined" and files.network != "distilled":
        raise InputError("--labels refined is for a student; give --network distilled, too")
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
