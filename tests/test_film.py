"""The film of the decision regions: its files are made of what the record holds."""

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from book import film
from fmnlib import runs, scores
from fmnlib.data import load
from fmnlib.plane import SIDE, border

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "01_local_overfitting.ipynb"
LARGEST = 300_000  # bytes of all its files


@pytest.fixture(scope="module")
def record():
    return runs.obtain([film.CONFIG], progress=False)[0]


@pytest.fixture(scope="module")
def committed():
    text = (ROOT / film.FOLDER / "wave.js").read_text()
    return json.loads(text.removeprefix("window.fmnFilm = ").removesuffix(";\n"))


def bits(text, shape):
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(packed)[: np.prod(shape)].reshape(shape)


def test_the_committed_files_are_what_the_command_makes(tmp_path):
    film.write(tmp_path)
    for name in ("wave.js", "wave.svg"):
        made = (tmp_path / film.FOLDER / name).read_bytes()
        assert made == (ROOT / film.FOLDER / name).read_bytes(), "fmn book --update"
    files = [*(ROOT / film.FOLDER).iterdir()]
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) < LARGEST


def test_another_seed_is_another_run(tmp_path, committed, record):
    film.write(tmp_path, seed=1)
    text = (tmp_path / film.FOLDER / "wave.js").read_text()
    about = json.loads(text.removeprefix("window.fmnFilm = ").removesuffix(";\n"))
    [other] = runs.obtain([dataclasses.replace(film.CONFIG, seed=1)], progress=False)
    assert about["right"] == other.correct.sum(axis=1).tolist() != committed["right"]


def test_a_page_reads_the_record_without_loss(committed, record):
    shape = (record.epochs, len(record.labels))
    np.testing.assert_array_equal(bits(committed["predicted"], shape), record.predicted)
    np.testing.assert_array_equal(bits(committed["classes"], shape[1:]), record.labels)
    trained = load(film.CONFIG)
    x, y, label, wrong = np.transpose(committed["points"])
    np.testing.assert_array_equal(trained.images[:, 0, 0, 0].numpy(), film.UNIT * x)
    np.testing.assert_array_equal(trained.labels.numpy(), label)
    np.testing.assert_array_equal(trained.flipped.numpy(), wrong.astype(bool))
    true = film.UNIT * np.array(committed["border"])
    np.testing.assert_allclose(true, border(np.linspace(0, 256, len(true))), atol=0.05)
    # Where no label is wrong, each point lies on its side of the true border.
    np.testing.assert_array_equal(
        (film.UNIT * y > border(film.UNIT * x)) ^ label.astype(bool), wrong
    )


def test_the_counts_are_the_definitions(committed, record):
    correct, places = record.correct, SIDE**2
    shares = {name: np.array(committed[name]) / places for name in ("right", "forgotten", "lost")}
    np.testing.assert_allclose(shares["right"], record.accuracy)
    np.testing.assert_allclose(shares["forgotten"], scores.forget_fraction(correct))
    for epoch, share in enumerate(shares["lost"]):
        before = correct[:epoch].any(axis=0) if epoch else np.zeros(places, bool)
        assert share == (before & ~correct[epoch]).mean()
    assert shares["lost"][-1] == scores.forgotten_after(correct, -1).mean()


def test_it_is_a_network_of_the_notebook():
    """The first one that it trains, with wrong labels."""
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    code = ["".join(cell["source"]) for cell in cells]
    [parameters] = [text for text in code if text.startswith("profile =")]
    [problem] = [text for text in code if text.startswith("problem =")]
    names = {}
    exec("import fmnlib as fmn\n" + parameters + "\n" + problem.partition("records =")[0], names)
    assert names["configs"][0] == film.CONFIG


def test_the_notebook_has_its_mark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from explorer import APPS

    assert [NOTEBOOK.read_text().count(mark) for mark in APPS] == [0, 1]


def test_the_still_shows_what_is_lost_at_the_end(record):
    lost = film.lost(record.correct, record.epochs - 1).reshape(SIDE, SIDE)
    path = "".join(film.cells(lost))
    wide = [int(part.partition("v")[0]) for part in path.split("h")[1::2]]
    assert sum(wide) == lost.sum() > 0
    assert f'd="{path}"' in (ROOT / film.FOLDER / "wave.svg").read_text()
