"""The commands `fmn score` and `fmn fuse`; how a command reads a run and shows what it found."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from fmnlib import scores
from fmnlib.config import InputError
from fmnlib.files import write_whole
from fmnlib.fusion import Fusion
from fmnlib.gains import gains, in_rows, picks
from fmnlib.intervals import Interval
from fmnlib.outside.external import Files, fuse_files
from fmnlib.outside.tracker import is_tracked, load_tracked
from fmnlib.record import RunRecord
from fmnlib.search import knowledge_fusion

__all__ = ["Json", "facts", "find_folder", "fuse", "load", "names", "score", "show"]

Json = Annotated[bool, Parameter(name="--json", negative="")]


_NO_FILES = Files()


def score(run: str, *, split: int = 0, html: Path | None = None, as_json: Json = False) -> None:
    """Diagnose a run: did it overfit locally, where, since when, and what is worth doing.

    The diagnosis looks at the validation half alone; intervals are of 95% over its samples.

    Args:
        run: Folder of a run or of a Tracker, the beginning of a run's name, or a record's .npz
            file.
        split: Seed that draws the halves.
        html: File to write the diagnosis to as one page with pictures.
        as_json: Print JSON.
    """
    from fmnlib.diagnosis import diagnose

    if html is not None and html.is_dir():
        raise InputError(f"html is {html}, a folder; give the name of a file, such as report.html")
    record = load(run)
    found = diagnose(record, split=split)
    if html is not None:
        from fmnlib.study.report import page

        val = record.split(split)[0] if record.half == "all" else record
        fusion = None if val.probs is None else knowledge_fusion(val)
        text = page(val, found, fusion, title=f"What {Path(run).name} forgot")
        write_whole(html, text.encode())
    if as_json:
        print(json.dumps(facts(record) | {"diagnosis": found.summary()}))
        return
    show({f"{name}, all samples": value for name, value in facts(record).items()}, as_json)
    print("", *found.sentences, sep="\n")
    if files := record.provenance.get("checkpoints"):
        shown = (found.epoch, found.early_epoch)
        print(*(f"Epoch {epoch} is {files[epoch]}." for epoch in dict.fromkeys(shown)))


def fuse(
    run: str = "",
    *,
    files: Annotated[Files, Parameter(name="*")] = _NO_FILES,
    split: int = 0,
    window: int | None = None,
    max_picks: int | None = None,
    grid: bool = False,
    as_json: Json = False,
) -> None:
    """Find the forgotten epochs of a run and mix them in (Knowledge Fusion).

    Half of the evaluation data chooses, the other half is reported; intervals are of 95% over
    its samples, by Tango's score for paired predictions. Of a run, the result is written to
    fusion.json in its folder. Of checkpoints from elsewhere (--checkpoints, --model, --data),
    one network is written that needs no fmnlib to load.

    Args:
        run: Folder of a run or of a Tracker, the beginning of a run's name, or a record's .npz
            file.
        files: Checkpoints from elsewhere, in place of a run.
        split: Seed that draws the halves.
        window: Epochs averaged on either side of a pick; 1, or 0 where there are fewer than three,
            if not given. With few checkpoints 0 may be better.
        max_picks: Stop after so many picks; 1 is the papers' "(i)".
        grid: Choose shares on the papers' grid of 0.01 instead of exactly.
        as_json: Print JSON.
    """
    if bool(run) == bool(files.checkpoints):
        files_too = "--checkpoints 'ckpt/*.pt' --model NAME --data FOLDER, the pattern in quotes"
        raise InputError(f"give a run, or {files_too}")
    if run and files != _NO_FILES:
        raise InputError(f"{run!r} is a run; --model, --data and the like go with --checkpoints")
    shares = np.arange(0, 1.005, 0.01) if grid else None

    def search(val: RunRecord) -> Fusion:
        return knowledge_fusion(val, window=window, max_picks=max_picks, grid=shares)

    if files.checkpoints:
        show(fuse_files(files, search, split) | {"split": split}, as_json)
        return
    record = load(run)
    val, test = record.split(split)
    fusion = search(val)
    place = find_folder(run)
    if place is not None:
        dataclasses.replace(fusion, split=split).save(place / "fusion.json")
    told = in_rows(gains(val, test, fusion)) | picks(fusion, names(record))
    show(told | {"networks": fusion.networks, "split": split}, as_json)


def facts(record: RunRecord) -> dict[str, Any]:
    """What a run's record says at a glance."""
    forget = scores.forget_fraction(record.correct)
    worst = int(forget.argmax())
    return {
        "final accuracy": float(record.accuracy[-1]),
        "best accuracy": float(record.accuracy.max()),
        "best epoch": int(record.accuracy.argmax()),
        "max forget fraction": float(forget[worst]),
        "at epoch": worst,
        "learned since": float(scores.learn_fraction(record.correct)[worst]),
    }


def names(record: RunRecord) -> list[str]:
    """What the epochs of a record are called: the files of checkpoints from elsewhere."""
    files = record.provenance.get("checkpoints", [])
    return list(files) or [f"epoch {epoch}" for epoch in range(record.epochs)]


def find_folder(run: str) -> Path | None:
    """The folder of a run or of a Tracker; None for a record's file."""
    from fmnlib.study import runs

    if run.endswith(".npz"):
        return None
    return Path(run) if is_tracked(run) else runs.find(run)


def load(run: str) -> RunRecord:
    """The record that a person means by a folder, a name or a file."""
    if is_tracked(run):
        return load_tracked(run)
    return RunRecord.load(find_folder(run) or Path(run))


def show(rows: Mapping[str, Any], as_json: bool) -> None:
    """Print named values: for people a line each, shares in percent; or one line of JSON.

    Of the processes that train one run together, the first speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps({k: vars(v) if isinstance(v, Interval) else v for k, v in rows.items()}))
        return
    for name, value in rows.items():
        text = f"{value:.1%}" if isinstance(value, float) else str(value)
        print(f"{name:<38} {text}")
