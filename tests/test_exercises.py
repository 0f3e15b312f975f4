"""The exercises: two a chapter, a solution each, whose code runs on the committed records."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "book" / "exercises.md").read_text()
BEGIN = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
SOLUTIONS = dict(
    re.findall(r"^::::\{solution\} (\S+)\n(.*?)^::::$", PAGE, re.DOTALL | re.MULTILINE)
)
EXERCISES = re.findall(r"^::::\{exercise\} .+\n:label: (\S+)$", PAGE, re.MULTILINE)
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
CODE = [name for name, text in SOLUTIONS.items() if "```python" in text]
CHAPTERS = {
    "What a network forgets": "book/definitions.md",
    "Knowledge Fusion and distillation": "book/algorithm.md",
    "Quickstart": "notebooks/00_quickstart.ipynb",
    "The papers' data": "notebooks/12_cifar100.ipynb",
    "Can a better network have forgotten something?": "notebooks/01_local_overfitting.ipynb",
    "Accuracy that falls and rises": "notebooks/02_double_descent.ipynb",
    "What decides how much is forgotten": "notebooks/03_forget_fraction.ipynb",
    "Why linear networks forget": "notebooks/04_linear_theory.ipynb",
    "Clean labels": "notebooks/05_clean_data.ipynb",
    "Label noise": "notebooks/06_label_noise.ipynb",
    "Methods that change the training": "notebooks/07_training_methods.ipynb",
    "Distillation": "notebooks/08_distillation.ipynb",
    "Ablations": "notebooks/09_ablations.ipynb",
    "Beyond the papers": "notebooks/10_beyond.ipynb",
    "Wrong labels": "notebooks/13_wrong_labels.ipynb",
    "Beyond images": "notebooks/14_text.ipynb",
    "Your own model": "notebooks/11_your_own_model.ipynb",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """What all solutions begin with; a run that is not committed would be trained here."""
    trained = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMN_RUNS", str(trained))
        patch.syspath_prepend(ROOT / "book" / "_ext")
        names = {}
        exec(BEGIN, names)
        yield names
    assert not list(trained.iterdir()), "a solution needs a record that is not committed"


@pytest.mark.parametrize("name", CODE)
def test_the_code_of_a_solution_runs(begun, name):
    from solutions import run

    names = dict(begun)
    for block in re.findall(r"```python\n(.*?)```", SOLUTIONS[name], re.DOTALL):
        printed = run(block, names)
        assert printed
        assert not re.search(r"\bnan\b|\binf\b", printed)


def test_code_that_fails_is_not_passed_over(begun):
    from solutions import run

    with pytest.raises(ZeroDivisionError):
        run("print(1 / 0)", {})


def test_each_exercise_has_its_solution_folded_right_after_it():
    assert len(EXERCISES) == len(set(EXERCISES))
    assert list(SOLUTIONS) == EXERCISES
    assert len(CODE) >= len(EXERCISES) / 2
    for name, text in SOLUTIONS.items():
        assert text.startswith(":class: dropdown\n"), name
        assert len(text) > 100, name


def test_every_section_is_of_a_chapter():
    assert list(SECTIONS) == list(CHAPTERS)


@pytest.mark.parametrize(("section", "chapter"), CHAPTERS.items())
def test_a_chapter_has_two_exercises_and_leads_to_them(section, chapter):
    assert SECTIONS[section].count("::::{exercise}") >= 2
    text = (ROOT / chapter).read_text()
    if chapter.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    anchor = re.sub(r"[^a-z -]", "", section.lower()).replace(" ", "-")
    assert f"exercises.md#{anchor})" in text


def test_the_four_lines_of_the_cheat_sheet_run(tmp_path, monkeypatch):
    import torch

    import fmnlib as fmn

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "book" / "cheat_sheet.md").read_text()
    lines = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert len(lines) == 4
    model, images = torch.nn.Linear(3, 2), torch.randn(40, 3)
    names = {"fmn": fmn, "model": model, "val_images": images, "val_labels": [0, 1] * 20}
    exec(lines[0], names)
    for _ in range(3):
        exec(lines[1], names)
        with torch.no_grad():
            model.weight += torch.randn(2, 3)
    exec("\n".join(lines[2:]), names)
    assert names["mix"].shape == (20, 2)
    assert names["test"].epochs == 3
