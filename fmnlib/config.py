"""What one training run is asked to do, and the error that answers a bad wish."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

__all__ = ["InputError", "RunConfig"]


class InputError(ValueError):
    """Bad input, told in one line: what was given, what is allowed, what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what one training run computes; the defaults are the quick profile.

    The split of the evaluation data is no part of it: it is drawn after training, by
    `RunRecord.split`, and changes no network. A student's split is named by its `teacher`.

    Attributes:
        dataset: digits, mnist, fashion_mnist, cifar10, cifar100, or folder:PATH.
        train_samples: Train on this many images, drawn with `noise_seed`; 0 takes all.
        eval_samples: Record this many evaluation images; 0 takes all.
        image_size: Side, in pixels, to which the images of a folder are resized.
        model: convnet, mlp, resnet8, resnet20, resnet18, or torchvision:NAME.
        width: Factor on the number of channels (not for torchvision's networks).
        epochs: Passes over the training data.
        batch_size: Images a step.
        optimizer: SGD with Nesterov momentum, or AdamW.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty of SGD, decoupled decay of AdamW.
        schedule: Learning rate over time. Step divides by 10 at 1/2 and 3/4 of the run.
        cycles: Number of cosine cycles of the cyclic schedule.
        augment: crop shifts by up to an eighth of the side, crop_flip mirrors as well.
        noise: none, symmetric, asymmetric, human (CIFAR-100N), or matrix:FILE.csv.
        noise_rate: Share of the training labels that are flipped (symmetric, asymmetric).
        ema: Decay of the exponential moving average of weights that is recorded; 0 is off.
        keep_every: Keep probabilities and checkpoint of every k-th epoch, and of the last one.
        teacher: Name of the ensemble that a student learns from; empty for a plain run.
        temperature: Softens the teacher and the student in the soft-target loss.
        soft_share: Weight of the soft-target loss; the labels' loss has the rest.
        seed: Initialisation, order of the data, augmentation.
        noise_seed: Which labels are flipped, and which samples are taken.
    """

    dataset: str = "digits"
    train_samples: int = 0
    eval_samples: int = 0
    image_size: int = 32
    model: str = "convnet"
    width: float = 1.0
    epochs: int = 60
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "step", "constant", "cyclic"] = "cosine"
    cycles: int = 5
    augment: Literal["none", "crop", "crop_flip"] = "none"
    noise: str = "none"
    noise_rate: float = 0.0
    ema: float = 0.0
    keep_every: int = 1
    teacher: str = ""
    temperature: float = 1.0
    soft_share: float = 1.0
    seed: int = 0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, getattr(self, field.name))
        kind = self.noise.partition(":")[0]
        if kind not in ("none", "symmetric", "asymmetric", "human", "matrix"):
            allowed = "none, symmetric, asymmetric, human or matrix:FILE.csv"
            raise InputError(f"noise is {self.noise!r}; allowed are {allowed}")
        if (kind in ("symmetric", "asymmetric")) != (self.noise_rate > 0):
            need = "above 0" if kind in ("symmetric", "asymmetric") else "0"
            raise InputError(
                f"noise_rate is {self.noise_rate} with noise={self.noise}; make it {need}"
            )
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                allowed = f"at least {low}" if high == np.inf else f"from {low} to {high:.6g}"
                raise InputError(f"{name} is {getattr(self, name)}; allowed is {allowed}")

    def _check_type(self, name: str, value: object) -> None:
        kind = get_type_hints(type(self))[name]
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
    def setting(self) -> str:
        """The noise in short: clean, sym40, asym20, human or matrix."""
        kind, rate = self.noise.partition(":")[0], round(100 * self.noise_rate)
        short = {"none": "clean", "symmetric": f"sym{rate}", "asymmetric": f"asym{rate}"}
        return short.get(kind, kind)

    @property
    def id(self) -> str:
        """A readable name that ends in a short hash of every field.

        >>> RunConfig(noise="symmetric", noise_rate=0.4, seed=2).id.rpartition("-")[0]
        'digits-convnet-sym40-s2'
        """
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:8]
        parts = [self.dataset.rstrip("/").rpartition("/")[2].replace("folder:", "")]
        parts += [self.model.replace(":", "_"), self.setting]
        parts += [self.teacher] if self.teacher else []
        return "-".join([*parts, f"s{self.seed}", digest])

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RunConfig":
        """Build a config from a mapping; an unknown key is an error that names the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise InputError(f"a run has no setting {key!r}; {hint}")
        return cls(**fields)


_RANGES = [
    ("train_samples", 0, np.inf),
    ("eval_samples", 0, np.inf),
    ("image_size", 8, np.inf),
    ("width", 0.01, np.inf),
    ("epochs", 1, np.inf),
    ("batch_size", 2, np.inf),
    ("lr", 0, np.inf),
    ("momentum", 0, 1 - 1e-6),
    ("weight_decay", 0, np.inf),
    ("cycles", 1, np.inf),
    ("noise_rate", 0, 1 - 1e-6),
    ("ema", 0, 1 - 1e-6),
    ("keep_every", 1, np.inf),
    ("temperature", 0.01, np.inf),
    ("soft_share", 0, 1),
    ("seed", 0, 2**31),
    ("noise_seed", 0, 2**31),
]
