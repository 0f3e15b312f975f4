"""Local overfitting of deep networks: measure what they forget, fuse it back, distil it.

    import fmnlib as fmn

Start with `RunRecord`, the predictions of a network after each epoch of its training; scores and
fusions are functions of it. Names load when they are first used: only `train` and `distill` need
torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmnlib.config import InputError as InputError
    from fmnlib.config import RunConfig as RunConfig
    from fmnlib.diagnosis import diagnose as diagnose
    from fmnlib.distillation import distill as distill
    from fmnlib.fusion import Fusion as Fusion
    from fmnlib.fusion import fuse as fuse
    from fmnlib.fusion import knowledge_fusion as knowledge_fusion
    from fmnlib.labels import suspects as suspects
    from fmnlib.record import RunRecord as RunRecord
    from fmnlib.scores import forget_fraction as forget_fraction
    from fmnlib.scores import learn_fraction as learn_fraction
    from fmnlib.tracker import Tracker as Tracker
    from fmnlib.training import train as train

__version__ = "0.2.0"

_MODULE_OF = {
    "InputError": "config",
    "RunConfig": "config",
    "RunRecord": "record",
    "Fusion": "fusion",
    "forget_fraction": "scores",
    "learn_fraction": "scores",
    "knowledge_fusion": "fusion",
    "fuse": "fusion",
    "diagnose": "diagnosis",
    "suspects": "labels",
    "Tracker": "tracker",
    "train": "training",
    "distill": "distillation",
}
__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fmnlib' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fmnlib.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
