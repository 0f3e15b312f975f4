"""nbval with a tolerance: printed numbers may differ by rounding, text may not."""

import math
import re

import pytest

NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?"
)
FRACTION = 1e-3


class Approximate(str):
    """Text that equals another if its words are the same and its numbers are near.

    Integers must be equal; column padding may move with the width of a number.
    """

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        mine, theirs = str(self), str(other)
        return _words(mine) == _words(theirs) and all(
            a == b
            or (
                "." in a
                and math.isclose(float(a), float(b), rel_tol=FRACTION)
            )
            for a, b in zip(
                NUMBER.findall(mine), NUMBER.findall(theirs), strict=True
            )
        )

    def __ne__(self, other: object) -> bool:
        return not self == other


def _words(text: str) -> str:
    return re.sub(r"[\s-]+", " ", NUMBER.sub("#", text))


def pytest_collectstart(collector: pytest.Collector) -> None:
    if type(collector).__name__ == "IPyNbFile":
        collector.skip_compare += ("image/svg+xml", "stderr")


def pytest_itemcollected(item: pytest.Item) -> None:
    if type(item).__name__ == "IPyNbCell":
        plain = item.sanitize
        item.sanitize = lambda text: (
            Approximate(plain(text)) if isinstance(text, str) else text
        )
