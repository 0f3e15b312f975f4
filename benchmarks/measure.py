"""Measurements as medians with their spread, and the table that shows them."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

__all__ = ["Row", "Spread", "table"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing.

    >>> Spread.of([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.0, high=3.0, count=3)
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found), len(found))

    def __str__(self) -> str:
        if self.count == 1:
            return _number(self.median)
        return f"{_number(self.median)} ({_number(self.low)} to {_number(self.high)})"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: The benchmark.
        what: What was measured.
        unit: Of the numbers that follow.
        ours: This library.
        usual: The usual script, if there is one.
        floor: What the machine's measured rates allow at best.
        bound: Which rate the floor comes from.
        device: Hardware, and the number format of the networks.
        note: What else one must know.
    """

    section: str
    what: str
    unit: str
    ours: Spread
    usual: Spread | None = None
    floor: float | None = None
    bound: str = ""
    device: str = ""
    note: str = ""

    @property
    def gain(self) -> str:
        """How many times better than the usual script; rates are better high, others low."""
        if self.usual is None or self.unit in ("%", "x a plain run"):
            return ""
        better = self.ours.median / self.usual.median
        return f"{better if self.unit.endswith('/s') else 1 / better:.1f}x"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    head = "benchmark | what | unit | ours | usual script | gain | floor | bound by | on | note"
    lines = [f"| {head} |", "|" + "---|" * len(head.split("|"))]
    for row in rows:
        floor = "" if row.floor is None else _number(row.floor)
        cells = [row.section, row.what, row.unit, str(row.ours), str(row.usual or ""), row.gain]
        lines.append(f"| {' | '.join([*cells, floor, row.bound, row.device, row.note])} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three digits, and no more than three places.

    >>> [_number(x) for x in (12345.6, 1.2345, 0.000123)]
    ['12,346', '1.23', '0.000123']
    """
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
