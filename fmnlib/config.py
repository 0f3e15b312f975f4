"""What a training run computes, and the errors for bad input."""

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

TAIL = 0.75  # where the tail of a learning rate schedule begins, as a share of the run
SOFT_SHARES = {"given": 0.9, "refined": 0.5}  # default soft_share of the commands, by `labels`


class InputError(ValueError):
    """Bad input, in one line: what was given, what is allowed, what to do."""


class Paused(Exception):
    """A run stopped because its time was up; the same call resumes it after its last epoch."""


Number = int | float
Schedule = Literal["cosine", "step", "constant", "cyclic", "constant_tail", "cyclic_tail"]

LOSSES: dict[str, dict[str, tuple[float, float, float]]] = {
    "cross_entropy": {},
    "gce": {"q": (0.7, 0.01, 1)},
    "sce": {"a": (0.1, 0, 1e6), "b": (1.0, 0, 1e6)},
    "elr": {"strength": (3.0, 0, 1e6), "momentum": (0.7, 0, 1)},
    "sat": {"momentum": (0.9, 0, 1), "start": (0.3, 0, 1)},
    "ps_kd": {"a": (0.8, 0, 1)},
}
"""The parameters of each loss: default (the papers' for CIFAR-10), smallest, largest value."""


def _range(default: Number, low: Number, high: Number = math.inf, below: Number = math.inf) -> Any:
    """A field for a number with `low <= number <= high` and `number < below`."""
    return dataclasses.field(default=default, metadata={"range": (low, high, below)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Settings that a student, a network made from an ensemble, has beside those of its run."""

    teacher: str = ""
    """What the student is made from: an ensemble, or a noise matrix (glc); with a digest of it."""
    temperature: float = _range(2.0, 0.01)
    """Temperature T of teacher and student in the soft-target loss."""
    soft_share: float = _range(0.9, 0, 1)
    """Weight of the soft-target loss; the label loss has the rest."""
    labels: Literal["given", "refined"] = "given"
    """Labels of the label loss: those of the data, or the teacher's class of the same view."""
    teacher_views: int = _range(0, 0)
    """Augmented views per image that are predicted in advance; 0 predicts while training."""
    init: Literal["scratch", "teacher"] = "scratch"
    """Start from new weights, or from the teacher's network with the largest mixture weight."""

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what one training run computes; the defaults are the quick profile.

    The split of the evaluation data is not part of it: `RunRecord.split` draws it after training.
    """

    dataset: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, wave or folder:PATH."""
    classes: Literal["all", "first_half", "second_half"] = "all"
    """All classes, or half of them, for transfer learning."""
    evaluate: Literal["test", "heldout"] = "test"
    """Record predictions for the test data, or for training data that train_samples leaves out."""
    train_samples: int = _range(0, 0)
    """Train on this many images, drawn with noise_seed; 0 takes all."""
    eval_samples: int = _range(0, 0)
    """Record this many evaluation images, drawn with noise_seed; 0 takes all."""
    image_size: int = _range(32, 8)
    """Side of the centre crop of images from folders, in pixels."""
    resize: int = _range(0, 0)
    """Shorter side before the centre crop, in pixels; 0 takes 256/224 of image_size."""
    model: str = "convnet"
    """convnet, mlp, resnet8, resnet20, resnet18 or torchvision:NAME."""
    width: float = _range(1.0, 0.01)
    """Factor on the number of channels (not of torchvision's networks)."""
    epochs: int = _range(40, 1, below=1_000_000)
    """Passes over the training data."""
    batch_size: int = _range(64, 2)
    """Images per step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = _range(0.1, 0)
    """Peak learning rate."""
    momentum: float = _range(0.9, 0, below=1)
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's momentum."""
    weight_decay: float = _range(5e-4, 0)
    """L2 penalty of SGD, decoupled weight decay of AdamW."""
    clip_norm: float = _range(0.0, 0)
    """Largest norm of the gradient; 0 is off."""
    warmup: float = _range(0.0, 0)
    """Epochs in which the learning rate rises linearly, before the schedule begins."""
    schedule: Schedule = "cosine"
    """Learning rate over time: see `fmnlib.training.learning_rate`."""
    cycles: int = _range(5, 1)
    """Cosine cycles of the cyclic schedules."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Random crops (shifts by up to an eighth of the side), and horizontal flips."""
    loss: Literal["cross_entropy", "gce", "sce", "elr", "sat", "ps_kd"] = "cross_entropy"
    """Cross-entropy, or one made for label noise: see `fmnlib.losses`."""
    loss_parameters: tuple[Number, ...] = ()
    """q for gce; a, b for sce; strength, momentum for elr; momentum, start (share of epochs) for
    sat; a for ps_kd. Defaults are the papers' for CIFAR-10; for CIFAR-100 sce 6 0.1, elr 7 0.9."""
    label_smoothing: float = _range(0.0, 0, below=1)
    """Share of the target that is spread over all classes."""
    noise: str = "none"
    """Label noise: none, symmetric, asymmetric, human (CIFAR-100N) or matrix:FILE.csv."""
    noise_rate: float = _range(0.0, 0, below=1)
    """Share of the training labels that are flipped (symmetric, asymmetric)."""
    validation_half: str = "unused"
    """unused, or trained on: added:SPLIT with the training data, alone:SPLIT without them."""
    ema: float = _range(0.0, 0, below=1)
    """Decay of the exponential moving average of weights that is recorded; 0 is off."""
    keep_every: int = _range(1, 1)
    """Keep probabilities and checkpoint of every k-th epoch (of the tail, if any) and the last."""
    keep: tuple[int, ...] = ()
    """Keep those of the epochs listed here, and of the last one, instead."""
    keep_best: int = _range(0, 0)
    """Keep at most this many (2 or more), by `fmnlib.scores.covering` on split 0; 0 is off."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format; auto is float32 on CPUs, bfloat16 on GPUs, float16 at capability 7.x."""
    seed: int = _range(0, 0, below=2**31)
    """Seed of initialisation, data order and augmentation."""
    noise_seed: int = _range(0, 0, below=2**31)
    """Seed of the label noise and of the choice of samples."""
    student: StudentConfig | None = None
    """Teacher and loss of a student, a network made from an ensemble."""

    def __post_init__(self) -> None:
        _check(self)
        if self.warmup >= self.epochs:
            problem = f"warmup is {self.warmup} of {self.epochs} epochs"
            raise InputError(f"{problem}; make warmup less than epochs")
        if 0 < self.resize < self.image_size:
            problem = f"resize is {self.resize} and image_size is {self.image_size}"
            raise InputError(f"{problem}; make resize 0 or at least image_size")
        if any(not 0 <= epoch < self.epochs for epoch in self.keep):
            problem = f"keep is {self.keep} in a run of {self.epochs} epochs"
            raise InputError(f"{problem}; epochs count from 0 to {self.epochs - 1}")
        others = self.keep or self.keep_every > 1 or self.tail_epoch
        if self.keep_best and (self.keep_best < 2 or others):
            alone = "2 or more without keep, keep_every and a schedule with a tail"
            raise InputError(f"keep_best is {self.keep_best}; make it {alone}, or 0")
        if not re.fullmatch(r"unused|(added|alone):\d+", self.validation_half):
            problem = f"validation_half is {self.validation_half!r}"
            raise InputError(f"{problem}; allowed are unused, added:SPLIT or alone:SPLIT")
        self._check_loss()
        if not re.fullmatch("none|symmetric|asymmetric|human|matrix:.+", self.noise):
            allowed = "none, symmetric, asymmetric, human or matrix:FILE.csv"
            raise InputError(f"noise is {self.noise!r}; allowed are {allowed}")
        drawn = self.noise in ("symmetric", "asymmetric")
        if drawn != (self.noise_rate > 0):
            problem = f"noise_rate is {self.noise_rate} with noise={self.noise}"
            remedy = "above 0" if drawn else "0, or choose a kind of noise"
            raise InputError(f"{problem}; make it {remedy}")

    def _check_loss(self) -> None:
        ranges, given = LOSSES[self.loss], self.loss_parameters
        allowed = [f"{name} from {low:g} to {high:g}" for name, (_, low, high) in ranges.items()]
        pairs = zip(given, ranges.values(), strict=False)
        fits = [low <= number <= high for number, (_, low, high) in pairs]
        if given and (len(given) != len(ranges) or not all(fits)):
            problem = f"loss_parameters is {given} with loss={self.loss}"
            raise InputError(f"{problem}; give {' and '.join(allowed) or 'none'}")
        if given == tuple(default for default, _, _ in ranges.values()):
            object.__setattr__(self, "loss_parameters", ())  # the same run has the same id
        if self.loss != "cross_entropy" and (self.label_smoothing or self.student):
            other = "a student" if self.student else f"label_smoothing={self.label_smoothing}"
            raise InputError(f"loss is {self.loss!r} with {other}; make it cross_entropy there")

    def keeping(self, every: int, **changes: Any) -> "RunConfig":
        """This config with changes, keeping every so many epochs whatever this one keeps."""
        return dataclasses.replace(self, keep=(), keep_best=0, keep_every=every, **changes)

    @property
    def tail_epoch(self) -> int:
        """The first epoch that lies in the tail of the schedule; 0 for a schedule without one."""
        first = self.warmup + TAIL * (self.epochs - self.warmup)
        return math.ceil(first) if self.schedule.endswith("tail") else 0

    @property
    def teacher(self) -> str:
        """Name of the ensemble that the network is made from; empty for a plain run."""
        return "" if self.student is None else self.student.teacher

    @property
    def setting(self) -> str:
        """Short name of the noise, such as clean, sym40, asym20, human or matrix."""
        kind, rate = self.noise.partition(":")[0], f"{100 * self.noise_rate:.6g}"
        short = {"none": "clean", "symmetric": f"sym{rate}", "asymmetric": f"asym{rate}"}
        return short.get(kind, kind)

    @property
    def condition(self) -> str:
        """Regime and noise; the papers' regime is augmented, classic overfitting is memorising.

        >>> RunConfig(noise="symmetric", noise_rate=0.4).condition
        'memorising_sym40'
        """
        return f"{'memorising' if self.augment == 'none' else 'augmented'}_{self.setting}"

    @property
    def id(self) -> str:
        """A readable name that ends in a short hash of the fields that differ from the defaults.

        So a new field, whose default changes nothing, leaves the names of older runs as they are.

        >>> RunConfig(noise="symmetric", noise_rate=0.4, seed=2).id.rpartition("-")[0]
        'digits-convnet-sym40-s2'
        """
        chosen = self.changes()
        chosen |= chosen.pop("student", {})
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        parts = [self.dataset.rstrip("/").rpartition("/")[2].rpartition(":")[2]]
        parts += [self.model.replace(":", "_"), self.setting]
        parts += [self.teacher] if self.teacher else []
        parts += [] if self.loss == "cross_entropy" else [self.loss]
        return "-".join([*parts, f"s{self.seed}", digest])

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the defaults, for JSON; `from_dict` reads them back.

        >>> RunConfig(epochs=3, student=StudentConfig(teacher="kf")).changes()
        {'epochs': 3, 'student': {'teacher': 'kf'}}
        """
        chosen = _differing(self)
        if self.student is not None:
            chosen["student"] = _differing(self.student)
        return chosen

    @classmethod
    def of_profile(cls, profile: str, **changes: Any) -> "RunConfig":
        """The config of a profile (quick, standard or paper), with some fields changed.

        >>> RunConfig.of_profile("paper", seed=1).id.rpartition("-")[0]
        'cifar100-resnet18-clean-s1'
        """
        if profile not in PROFILES:
            raise InputError(f"profile is {profile!r}; choose one of {', '.join(PROFILES)}")
        return cls.from_dict(PROFILES[profile] | changes)

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read the config.json of a run; an `InputError` if the file is damaged."""
        try:
            if not path.is_file():  # a pipe would hang
                raise OSError("it is not a file")
            return cls.from_dict(json.loads(path.read_text()))
        except Exception as error:  # files, JSON and numbers raise half a dozen kinds between them
            raise InputError(f"{path} is not a config ({error}); move its folder away") from error

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RunConfig":
        """Build a config from a mapping; an unknown key is an error that names the nearest one."""
        _refuse_unknown(fields, cls)
        # JSON has lists for tuples.
        settings: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if isinstance(student := settings.get("student"), Mapping):
            _refuse_unknown(student, StudentConfig)
            settings["student"] = StudentConfig(**student)
        return cls(**settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """Checkpoints of a training that fmnlib did not record, and the data to run them on."""

    checkpoints: str = ""
    """Pattern of files, in quotes, such as `'ckpt/*.safetensors'` or .pt files."""
    weights: Literal["model", "ema"] = "model"
    """Which weights of a file: those that were trained, or their moving average."""
    model: str = ""
    """torchvision:NAME, timm:NAME, one of `fmn train --model`, or your FILE.py:FUNCTION."""
    data: Path | None = None
    """Folder of validation images, `CLASS/*`, or your FILE.py:FUNCTION, which returns batches of
    inputs and labels; half of the samples choose, half are reported."""
    train: Path | None = None
    """The same for the training samples, to distil with."""
    network: Literal["averaged", "distilled"] = "averaged"
    """One network to write: averaged weights, or a distilled student."""
    labels: Literal["given", "refined"] = "given"
    """What a student learns beside the mixture's probabilities: the labels of the data, or the
    mixture's own class, for data of which many labels are wrong."""
    output: Path = Path("fused.safetensors")
    """File for the network written; the mixture weights are stored beside it as .json."""
    save_record: Path | None = None
    """File (.npz) for the predictions of the checkpoints, for `fmn diagnose`."""
    size: int = 224
    """Side of the images that the network sees, in pixels."""
    resize: int = 0
    """Shorter side before the centre crop, in pixels; 0 takes 256/224 of size."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean per channel, of pixels from 0 to 1; one number converts the images to grey."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation per channel."""
    epochs: int = 10
    """Epochs of distillation."""
    lr: float = 0.01
    """Learning rate of distillation."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise InputError(f"epochs is {self.epochs} and lr is {self.lr}; give more than 0")


PROFILES: dict[str, dict[str, Any]] = {
    "quick": {},
    "standard": {
        "dataset": "fashion_mnist",
        "train_samples": 10_000,
        "model": "resnet8",
        "epochs": 40,
        "batch_size": 128,
    },
    "paper": {
        "dataset": "cifar100",
        "model": "resnet18",
        "epochs": 200,
        "batch_size": 128,
        "augment": "crop_flip",
    },
}
"""What differs from the defaults of `RunConfig` at each scale of the experiments."""


def _check(config: "RunConfig | StudentConfig") -> None:
    """Check every field's type, choices and range."""
    kinds = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, kind, value = field.name, kinds[field.name], getattr(config, field.name)
        if kind is float and type(value) is int:  # JSON and people write 1 for 1.0
            object.__setattr__(config, name, float(value))
        elif kind in (int, float, bool, str) and type(value) is not kind:
            raise InputError(f"{name} is {value!r}; it must be of type {kind.__name__}")
        elif name == "keep":
            if not isinstance(value, tuple) or any(type(epoch) is not int for epoch in value):
                raise InputError(f"keep is {value!r}; give a tuple of integers")
        elif name == "loss_parameters":
            if not isinstance(value, tuple) or any(type(v) not in (int, float) for v in value):
                raise InputError(f"loss_parameters is {value!r}; give a tuple of numbers")
            object.__setattr__(config, name, tuple(map(float, value)))
        elif name == "student":
            if value is not None and not isinstance(value, StudentConfig):
                raise InputError(f"student is {value!r}; give a StudentConfig or None")
        elif (choices := get_args(kind)) and value not in choices:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        low, high, below = field.metadata.get("range", (-math.inf, math.inf, math.inf))
        if field.metadata and not (low <= value <= high and value < below):
            allowed = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            allowed += f" and below {below}" if below < math.inf else ""
            raise InputError(f"{name} is {value}; allowed is {allowed}")


def _differing(config: "RunConfig | StudentConfig") -> dict[str, Any]:
    return {k: v for k, v in vars(config).items() if v != getattr(type(config), k)}


def _refuse_unknown(settings: Mapping[str, Any], kind: type[RunConfig | StudentConfig]) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"a run has no setting {key!r}; {hint}")
