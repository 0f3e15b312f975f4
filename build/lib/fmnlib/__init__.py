"""Local overfitting of deep networks: measure what they forget, fuse it back, distil it.

Start with `fmnlib.record.RunRecord`; `fmnlib.scores` and `fmnlib.fusion` are functions of it.
"""

from fmnlib.config import InputError, RunConfig
from fmnlib.record import Result, RunRecord

__all__ = ["InputError", "Result", "RunConfig", "RunRecord"]
__version__ = "0.1.0"
