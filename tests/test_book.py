"""The book as text: its examples run, its numbers come from files, its sources are whole."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest

from fmnlib import InputError, book
from fmnlib.publish import collect, publish
from fmnlib.record import RunRecord

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "book").glob("*.md"))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.stem != "your_model"],  # test_guide follows that one
    ids=lambda page: page.stem,
)
def test_examples_print_what_their_comments_say(page):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, names)
        expected = re.findall(r"^print.*  # (.*)$", block, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected


def test_the_staging_copy_leaves_records_out_and_is_made_anew(tmp_path):
    staging = book.stage(tmp_path / "staging")
    assert (staging / "_toc.yml").read_bytes() == (ROOT / "_toc.yml").read_bytes()
    assert not (staging / "results" / "reference").exists()
    (staging / "book" / "left_over.md").touch()
    assert not (book.stage(staging) / "book" / "left_over.md").exists()


def test_what_a_notebook_publishes_is_gathered(tmp_path, monkeypatch):
    origin = {"commit": "abc", "changed": False, "device": "CPU", "torch": "2.15", "seconds": 1.5}
    record = RunRecord.from_arrays(np.array([[[0.5, 0.5]]]), [0])
    record = type(record)(**{**vars(record), "provenance": origin})
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **about: shown.append((data, about))
    )
    publish("item", {"sym40": {"kf": {"mean": 1.0, "sem": 0.5, "n": 3}}}, [record, record])
    [(data, about)] = shown
    output = nbformat.v4.new_output("display_data", data, metadata=about["metadata"])
    cell = nbformat.v4.new_code_cell("1", outputs=[output])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    [published] = collect(notebook)
    assert published["origin"] == origin | {"runs": 2, "seconds": 3.0}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "07_item.ipynb")
    book.gather(tmp_path)
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["item"]["sym40"]["kf"]["mean"] == 1
    provenance = json.loads((tmp_path / "results" / "provenance.json").read_text())
    assert provenance["item"]["notebook"] == "07_item"


def test_a_notebook_that_fails_is_named_with_its_error(tmp_path):
    copy = Path(shutil.copy(ROOT / "notebooks" / "00_quickstart.ipynb", tmp_path))
    before = copy.read_bytes()
    with pytest.raises(
        InputError, match="00_quickstart.ipynb failed in cell .*: .*noise_rate is 7"
    ):
        book.execute(copy, noise_rate=7.0)
    assert copy.read_bytes() == before


def test_a_number_that_does_not_exist_breaks_the_build(tmp_path):
    staging = book.stage(tmp_path / "staging")
    page = staging / "book" / "references.md"
    page.write_text(page.read_text() + "\n{result}`label_noise.sym40.magic`\n")
    with pytest.raises(InputError, match="the book does not build"):
        book.render(staging, tmp_path / "out")
