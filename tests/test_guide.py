"""The guide "Your own model", followed word for word in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "book" / "your_model.md"


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder afterwards, and what each command printed."""
    folder, printed = tmp_path_factory.mktemp("guide"), {}
    beside = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{beside}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", GUIDE.read_text(), re.S | re.M):
        name = re.match(r"# (\w+\.py)\n", block)
        if language == "python" and name:
            (folder / name[1]).write_text(block)
        elif language == "bash" and not block.startswith("pip install"):
            done = subprocess.run(
                ["bash", "-ec", block], cwd=folder, env=env, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block}\n{done.stderr}"
            printed[block] = done.stdout
    return folder, printed


def told(printed, part):
    [text] = [text for command, text in printed.items() if part in command]
    return text


def test_it_ends_with_everything_it_promises(followed):
    folder, printed = followed
    assert len(printed) == 7
    for name in ("report.html", "tracked/fusion.json", "averaged.safetensors", "student.json"):
        assert (folder / name).stat().st_size > 100
    assert len(list((folder / "tracked" / "checkpoints").iterdir())) == 40


def test_what_it_prints_is_what_it_says(followed):
    _, printed = followed
    assert "overfitting: " in told(printed, "fmn diagnose")
    for part in ("fmn fuse tracked\n", "averaged.safetensors", "distilled"):
        gain = re.search(
            r"gain, fused +([+-][\d.]+) points \(([+-][\d.]+) to", told(printed, part)
        )
        assert float(gain[2]) > 0
    one = re.search(r"gain, distilled +\S+ points \((\S+) to", told(printed, "distilled"))
    assert float(one[1]) > 0


def test_its_other_code_names_what_exists():
    text = GUIDE.read_text()
    from fmnlib import RunRecord, diagnosis
    from fmnlib.integrations import huggingface, lightning

    assert "from fmnlib.integrations.lightning import RecordEpochs" in text
    assert lightning.RecordEpochs
    assert huggingface.RecordEpochs
    assert RunRecord.from_arrays
    assert diagnosis.diagnose
