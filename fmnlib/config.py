"""What one training run is asked to do, and the error that answers a bad wish."""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

__all__ = ["PROFILES", "TAIL", "InputError", "Paused", "RunConfig"]


class InputError(ValueError):
    """Bad input, told in one line: what was given, what is allowed, what to do."""


class Paused(Exception):
    """A run stopped because its time was up; the same call goes on from its last epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what one training run computes; the defaults are the quick profile.

    The split of the evaluation data is no part of it: it is drawn after training, by
    `RunRecord.split`, and changes no network. A student's split is named by its `teacher`.

    Attributes:
        dataset: digits, mnist, fashion_mnist, cifar10, cifar100, animal10n, wave (points in the
            plane), folder:PATH (images read into memory), or stream:PATH (read while training).
        classes: all, or the first or the second half of them alone, for transfer learning.
        evaluate: Record predictions for the test data, or for the training images that
            `train_samples` leaves out, with the labels that they would be trained on.
        train_samples: Train on this many images, drawn with `noise_seed`; 0 takes all.
        eval_samples: Record this many evaluation images; 0 takes all.
        image_size: Side, in pixels, to which images from files are resized.
        eval_size: Side of streamed evaluation images; 0 is `image_size`.
        eval_resize: Their shorter side before the centre is cut out; 0 is 8/7 of `eval_size`.
        interpolation: How streamed images are resized.
        model: convnet, mlp, resnet8, resnet20, resnet18, or torchvision:NAME.
        width: Factor on the number of channels (not for torchvision's networks).
        epochs: Passes over the training data.
        batch_size: Images a step.
        optimizer: SGD with Nesterov momentum, or AdamW.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        nesterov: SGD looks ahead.
        weight_decay: L2 penalty of SGD, decoupled decay of AdamW.
        no_decay: Parameters that weight decay leaves alone.
        clip_norm: Largest norm of the gradient; 0 is off.
        warmup: Epochs in which the rate rises in a line, before the schedule begins.
        warmup_factor: Share of the rate that it rises from.
        lr_min: Where the cosine schedule ends.
        schedule: Learning rate over time. Step divides by 10 at 1/2 and 3/4 of the run, thirds at
            1/3 and 2/3. The two tails halve the rate along a cosine until `TAIL` of the run is
            done; then it stays constant, or falls to 0 in cycles.
        cycles: Number of cosine cycles of the cyclic schedules.
        augment: crop shifts by up to an eighth of the side, crop_flip mirrors as well. Of streamed
            images: imagenet crops, resizes and mirrors at random; trivial and rand add
            TrivialAugmentWide and RandAugment.
        erase: Probability that a rectangle of a streamed image is erased.
        mixup: alpha of mixup; 0 is off. With CutMix, each batch takes one of the two.
        cutmix: alpha of CutMix; 0 is off.
        label_smoothing: Share of the target that is spread over all classes.
        noise: none, symmetric, asymmetric, human (CIFAR-100N), or matrix:FILE.csv.
        noise_rate: Share of the training labels that are flipped (symmetric, asymmetric).
        ema: Decay of the exponential moving average of weights that is recorded; 0 is off.
        keep_every: Keep probabilities and checkpoint of every k-th epoch, and of the last one;
            of a schedule with a tail, in the tail alone.
        keep: Keep those of these epochs, and of the last one, instead.
        precision: Of the networks' arithmetic; auto is bfloat16 on a GPU, float32 on a CPU.
        teacher: Name of the ensemble that a student learns from; empty for a plain run.
        temperature: Softens the teacher and the student in the soft-target loss.
        soft_share: Weight of the soft-target loss; the labels' loss has the rest.
        teacher_views: Let the teacher score so many augmented views of each image beforehand, and
            the student choose among them; 0 scores every view as it comes.
        init: A student starts from scratch, or from its teacher's heaviest network.
        seed: Initialisation, order of the data, augmentation.
        noise_seed: Which labels are flipped, and which samples are taken.
    """

    dataset: str = "digits"
    classes: Literal["all", "first_half", "second_half"] = "all"
    evaluate: Literal["test", "heldout"] = "test"
    train_samples: int = 0
    eval_samples: int = 0
    image_size: int = 32
    eval_size: int = 0
    eval_resize: int = 0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    model: str = "convnet"
    width: float = 1.0
    epochs: int = 40
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    no_decay: Literal["none", "norms", "norms_and_biases", "embeddings"] = "none"
    clip_norm: float = 0.0
    warmup: float = 0.0
    warmup_factor: float = 0.01
    lr_min: float = 0.0
    schedule: Literal[
        "cosine", "step", "thirds", "constant", "cyclic", "constant_tail", "cyclic_tail"
    ] = "cosine"
    cycles: int = 5
    augment: Literal["none", "crop", "crop_flip", "imagenet", "trivial", "rand"] = "none"
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    noise: str = "none"
    noise_rate: float = 0.0
    ema: float = 0.0
    keep_every: int = 1
    keep: tuple[int, ...] = ()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    teacher: str = ""
    temperature: float = 2.0
    soft_share: float = 0.9
    teacher_views: int = 0
    init: Literal["scratch", "teacher"] = "scratch"
    seed: int = 0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, getattr(self, field.name))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value < high:
                allowed = f"at least {low}" + (f" and below {high}" if high < np.inf else "")
                raise InputError(f"{name} is {value}; allowed is {allowed}")
        for name in ("soft_share", "erase", "warmup_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; allowed is from 0 to 1")
        if self.warmup >= self.epochs or self.lr_min > self.lr:
            given = f"warmup is {self.warmup} of {self.epochs} epochs, lr_min {self.lr_min}"
            raise InputError(f"{given}; make warmup less than epochs and lr_min at most lr")
        streamed = self.dataset.startswith("stream:")
        fitting = (
            "none",
            *(("imagenet", "trivial", "rand") if streamed else ("crop", "crop_flip")),
        )
        if self.augment not in fitting:
            given = f"augment is {self.augment!r} with dataset={self.dataset}"
            raise InputError(f"{given}; choose one of {', '.join(fitting)}")
        if any(not 0 <= epoch < self.epochs for epoch in self.keep):
            given = f"keep is {self.keep} in a run of {self.epochs} epochs"
            raise InputError(f"{given}; epochs count from 0 to {self.epochs - 1}")
        kind, _, file = self.noise.partition(":")
        plain = ("none", "symmetric", "asymmetric", "human")
        if self.noise not in plain and not (kind == "matrix" and file):
            allowed = "none, symmetric, asymmetric, human or matrix:FILE.csv"
            raise InputError(f"noise is {self.noise!r}; allowed are {allowed}")
        drawn = kind in ("symmetric", "asymmetric")
        if drawn != (self.noise_rate > 0):
            given = f"noise_rate is {self.noise_rate} with noise={self.noise}"
            need = "above 0" if drawn else "0, or choose a kind of noise"
            raise InputError(f"{given}; make it {need}")

    def _check_type(self, name: str, value: object) -> None:
        kind = get_type_hints(type(self))[name]
        if name == "keep":
            if not isinstance(value, tuple) or any(type(epoch) is not int for epoch in value):
                raise InputError(f"keep is {value!r}; give epochs as a list of integers")
            return
        if choices := get_args(kind):
            if value not in choices:
                allowed = ", ".join(choices)
                raise InputError(f"{name} is {value!r}; choose one of {allowed}")
            return
        if kind is float and type(value) is int:  # JSON and people write 1 for 1.0
            object.__setattr__(self, name, float(value))
        elif type(value) is not kind:
            raise InputError(f"{name} is {value!r}; it must be of type {kind.__name__}")

    @property
    def tail_epoch(self) -> int:
        """The first epoch that lies in the tail of the schedule; 0 for a schedule without one."""
        return math.ceil(TAIL * self.epochs) if self.schedule.endswith("tail") else 0

    @property
    def setting(self) -> str:
        """The noise in short, one of clean, sym40, asym20, human or matrix."""
        kind, rate = self.noise.partition(":")[0], round(100 * self.noise_rate)
        short = {"none": "clean", "symmetric": f"sym{rate}", "asymmetric": f"asym{rate}"}
        return short.get(kind, kind)

    @property
    def id(self) -> str:
        """A readable name that ends in a short hash of the fields that differ from the defaults.

        So a new field, whose default changes nothing, leaves the names of older runs as they are.

        >>> RunConfig(noise="symmetric", noise_rate=0.4, seed=2).id.rpartition("-")[0]
        'digits-convnet-sym40-s2'
        """
        fields = dataclasses.fields(self)
        chosen = {f.name: getattr(self, f.name) for f in fields}
        chosen = {f.name: chosen[f.name] for f in fields if chosen[f.name] != f.default}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        parts = [self.dataset.rstrip("/").rpartition("/")[2].rpartition(":")[2]]
        parts += [self.model.replace(":", "_"), self.setting]
        parts += [self.teacher] if self.teacher else []
        return "-".join([*parts, f"s{self.seed}", digest])

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
        """Read a config from the JSON file that a run's folder holds.

        Raises:
            InputError: If the file is damaged or of another version.
        """
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no config ({error}); move its folder away") from error

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RunConfig":
        """Build a config from a mapping; an unknown key is an error that names the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise InputError(f"a run has no setting {key!r}; {hint}")
        listed = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}  # JSON's tuples
        return cls(**{**fields, **listed})


_RANGES = [
    ("train_samples", 0, np.inf),
    ("eval_samples", 0, np.inf),
    ("image_size", 8, np.inf),
    ("width", 0.01, np.inf),
    ("epochs", 1, np.inf),
    ("batch_size", 2, np.inf),
    ("lr", 0, np.inf),
    ("momentum", 0, 1),
    ("weight_decay", 0, np.inf),
    ("clip_norm", 0, np.inf),
    ("warmup", 0, np.inf),
    ("lr_min", 0, np.inf),
    ("mixup", 0, np.inf),
    ("cutmix", 0, np.inf),
    ("label_smoothing", 0, 1),
    ("eval_size", 0, np.inf),
    ("eval_resize", 0, np.inf),
    ("cycles", 1, np.inf),
    ("noise_rate", 0, 1),
    ("ema", 0, 1),
    ("keep_every", 1, np.inf),
    ("temperature", 0.01, np.inf),
    ("teacher_views", 0, np.inf),
    ("seed", 0, 2**31),
    ("noise_seed", 0, 2**31),
]

TAIL = 0.75
"""Where the tail of a schedule begins, as a share of the run."""

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
        "teacher_views": 16,
    },
}
"""What differs from the defaults of `RunConfig` at each scale of the experiments."""
