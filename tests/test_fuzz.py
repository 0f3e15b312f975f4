"""Damaged files and arguments end in the same outcome or in one line; `make fuzz` tries 2,000."""

import json
import time
from pathlib import Path

from benchmarks import fuzz

ROOT = Path(__file__).parent.parent


def test_a_sample_of_damage_is_refused_in_one_line_or_changes_nothing(monkeypatch):
    for name in ("FMN_RUNS", "FMN_WORKERS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # the program sets them; afterwards they are as before
    faults = []
    found = fuzz.run(84, seed=2, note=faults.append)
    assert faults == []
    assert sum(sum(counts.values()) for counts in found.values()) == 84
    assert set(found) == {target.kind for target in fuzz.targets()}
    assert sum(counts.get("refused", 0) for counts in found.values()) > 20
    assert sum(counts.get("same", 0) for counts in found.values()) > 5


def test_a_command_that_hangs_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz.__main__, "app", lambda *_, **__: time.sleep(9))
    assert "Hang" in fuzz.fault(*fuzz.call(["runs"]))


def test_what_is_a_fault():
    assert fuzz.fault(0, "{}\n", "a bar\n") == fuzz.fault(2, "", "a bar\nfmn: no\n") == ""
    assert "traceback" in fuzz.fault("KeyError: 1", "", "")
    assert "code 2" in fuzz.fault(2, "", "fmn: no\nand more\n")
    assert "control" in fuzz.fault(2, "", "fmn: \x1b[31m\n")
    assert fuzz._lost({"a": b"1", "b": b"2"}, {"moved": b"1"}, ["runs"]) == "lost ['b']"


def test_the_committed_outcome_has_no_fault():
    committed = json.loads((ROOT / "results" / "fuzz.json").read_text())
    assert "fault" not in committed["total"]
    assert sum(committed["total"].values()) == committed["cases"] >= 300
    assert set(committed["kinds"]) == {target.kind for target in fuzz.targets()}
