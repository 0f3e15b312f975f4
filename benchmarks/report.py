"""The table of the benchmarks: its rows as JSON keeps them, and all of it in Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fmnlib.files import write_whole

Row = dict[str, Any]
Floats = Sequence[float]
HEADS = "measured", "unit", "this library", "usual script", "gain", "at best"
BETTER = {"images/s": 1, "s": -1}  # high rates and short times; other units have no gain


def row(what: str, unit: str, ours: Floats, usual: Floats = (), **told: Any) -> Row:
    """Measurements of one thing; what may be told are `best`, its `bound` and a `note`."""
    measured = {"ours": _spread(ours), "usual": _spread(usual) if usual else None}
    return {"what": what, "unit": unit} | measured | {"best": None, "bound": "", "note": ""} | told


def report(numbers: dict[str, Any]) -> str:
    """A caption, the table, and where its numbers come from, with empty lines between them."""
    about = numbers["provenance"]
    lines = [HEADS, ["---"] * len(HEADS), *map(_cells, numbers["rows"])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"Medians and ranges on {about['device']}, {about['threads']} threads.\n\n{table}\n\n"
        f"Measured on {about['date']} with torch {about['torch']}, commit {about['commit']}, "
        "by `make benchmarks`; what is best follows from the rates that it measured, "
        f"{about['operations_per_s'] / 1e12:.2g} TFLOP/s in {about['dtype']} and "
        f"{about['bytes_per_s'] / 1e9:.2g} GB/s.\n"
    )


def note_origin(file: Path, part: str, about: dict[str, Any]) -> None:
    """Write into `measured.json`, beside a file of results, where a part of it came from."""
    path = file.with_name("measured.json")
    origins = json.loads(path.read_text()) if path.exists() else {}
    origins.setdefault(file.name, {})[part] = about
    write_whole(path, f"{json.dumps(origins, indent=1)}\n".encode())


def _spread(values: Floats) -> dict[str, float]:
    low, high = min(values), max(values)
    return {"median": median(values), "low": low, "high": high, "count": len(values)}


def _cells(row: Row) -> list[str]:
    ours, usual, unit = row["ours"], row["usual"], row["unit"]
    what = f"{row['section']}: {row['what']}" + (f" ({row['note']})" if row["note"] else "")
    gain = ""
    if usual and unit in BETTER:
        gain = f"{(ours['median'] / usual['median']) ** BETTER[unit]:.1f}×"
    best = "" if row["best"] is None else f"{_number(row['best'])} ({row['bound']})"
    return [what, unit, _range(ours), _range(usual) if usual else "", gain, best]


def _range(spread: dict[str, float]) -> str:
    low, middle, high = (_number(spread[key]) for key in ("low", "median", "high"))
    return middle if spread["count"] == 1 else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
