"""What a notebook hands to the book: its numbers, and where they came from.

Both travel in the notebook's own outputs, so that a published number and the notebook that shows
it can never differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fmnlib.record import RunRecord
from fmnlib.stats import Summary


def publish(
    item: str,
    summary: Summary,
    records: Sequence[RunRecord],
    others: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Show the origin of an item's numbers, and store both in the notebook's output for the book.

    The item is the notebook's name without its number. The numbers rest on the records, and on
    others of which only the provenance is given.
    """
    from IPython.display import display

    about = origin(records, others)
    text = "Measured on {device} with torch {torch}, commit {commit}: {runs} runs".format(**about)
    handed = {"item": item, "summary": summary, "origin": about}
    display({"text/plain": text}, raw=True, metadata={"fmnlib": handed})  # type: ignore[no-untyped-call]


def origin(
    records: Sequence[RunRecord], others: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Commit, day, device and versions of records and others; number and seconds of the records.

    >>> origin([], [{"commit": c, "changed": False} for c in ("2b", "1a")])["commit"]
    '1a, 2b'
    """
    every = [*(record.provenance for record in records), *others]

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(about.get(key, "")) for about in every}))

    return {
        "commit": all_of("commit"),
        "changed": any(about["changed"] for about in every),
        **{key: all_of(key) for key in ("date", "device", "threads", "python", "torch", "numpy")},
        "runs": len(records),
        "seconds": round(sum(record.provenance["seconds"] for record in records), 1),
    }


def collect(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `publish` left in a notebook: item, summary and origin of each call."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return [o["metadata"]["fmnlib"] for o in outputs if "fmnlib" in o.get("metadata", {})]
