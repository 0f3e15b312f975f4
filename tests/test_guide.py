"""The guide "Your own model", followed word for word in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "book" / "your_model.md"


GUIDE_TEXT = GUIDE.read_text()
BOOSTING = GUIDE_TEXT[GUIDE_TEXT.index("(boosting)=") : GUIDE_TEXT.index("(wrong-labels)=")]


def follow(text, folder):
    """What each command of a text printed; its files and what they make are in a folder."""
    printed = {}
    beside = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{beside}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M):
        name = re.match(r"# (\w+\.py)\n", block)
        if language == "python" and name:
            (folder / name[1]).write_text(block)
        elif language == "bash" and not block.startswith("pip install"):
            done = subprocess.run(
                ["bash", "-ec", block], cwd=folder, env=env, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block}\n{done.stderr}"
            printed[block] = done.stdout
    return printed


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder afterwards, and what each command printed."""
    folder = tmp_path_factory.mktemp("guide")
    return folder, follow(GUIDE_TEXT.replace(BOOSTING, ""), folder)


def told(printed, part):
    [text] = [text for command, text in printed.items() if part in command]
    return text


def test_it_ends_with_everything_it_promises(followed):
    folder, printed = followed
    assert len(printed) == 9
    for name in ("report.html", "tracked/fusion.json", "averaged.safetensors", "student.json"):
        assert (folder / name).stat().st_size > 100
    assert len(list((folder / "tracked" / "checkpoints").iterdir())) == 40


def test_what_it_prints_is_what_it_says(followed):
    _, printed = followed
    assert "overfitting: " in told(printed, "fmn diagnose")
    for part in ("fmn fuse tracked\n", "averaged.safetensors", "student.safetensors"):
        gain = re.search(
            r"gain, fused +([+-][\d.]+) points \(([+-][\d.]+) to", told(printed, part)
        )
        assert float(gain[2]) > 0
    one = re.search(
        r"gain, distilled +\S+ points \((\S+) to", told(printed, "student.safetensors")
    )
    assert float(one[1]) > 0


def test_its_own_inputs_give_the_student_that_folders_give(followed):
    """A function in place of the folders: as many checkpoints, as certain a gain."""
    one = re.search(
        r"gain, distilled +\S+ points \((\S+) to", told(followed[1], "taught.safetensors")
    )
    assert float(one[1]) > 0


def test_it_finds_about_as_many_wrong_labels_as_there_are(followed):
    rate = re.search(r"estimated noise rate +([\d.]+)%", told(followed[1], "fmn labels"))
    assert 30 < float(rate[1]) < 50


def test_its_boosted_trees_teach_a_better_student(tmp_path):
    pytest.importorskip("xgboost")
    printed = follow(BOOSTING, tmp_path)
    assert len(printed) == 2
    assert "overfitting: " in told(printed, "fmn diagnose")
    final, student = map(float, re.findall(r"\d\.\d{3}", told(printed, "teach.py")))
    assert student > final + 0.02


def test_its_other_code_names_what_exists():
    text = GUIDE_TEXT
    from fmnlib import RunRecord, diagnosis
    from fmnlib.integrations import huggingface, lightning

    assert "from fmnlib.integrations.lightning import RecordEpochs" in text
    assert lightning.RecordEpochs
    assert huggingface.RecordEpochs
    assert RunRecord.from_arrays
    assert diagnosis.diagnose
