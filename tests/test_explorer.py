"""The forgetting explorer: its files are what the command makes, of what the record holds."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from book import explorer
from fmnlib import fusion, runs, scores
from fmnlib.data import load
from fmnlib.paper.compare import replicates

ROOT = Path(__file__).parent.parent
PAGES = "book/intro.md", "notebooks/00_quickstart.ipynb"
LARGEST = 700_000  # bytes


@pytest.fixture(scope="module")
def config():
    [config] = replicates("quick", [explorer.NOISE], [0], ["augmented"])
    return config


@pytest.fixture(scope="module")
def test_half(config):
    return runs.obtain([config], progress=False)[0].split(explorer.SPLIT)[1]


@pytest.fixture(scope="module")
def committed():
    text = (ROOT / explorer.FOLDER / "digits.js").read_text()
    return json.loads(text.removeprefix("window.fmnExplorer = ").removesuffix(";\n"))


def array(text, dtype, shape):
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def test_the_committed_files_are_what_the_command_makes(tmp_path):
    explorer.write(tmp_path)
    for name in ("digits.js", "digits.svg"):
        made = (tmp_path / explorer.FOLDER / name).read_bytes()
        assert made == (ROOT / explorer.FOLDER / name).read_bytes(), "fmn book --update"
    assert len(made) < (ROOT / explorer.FOLDER / "digits.js").stat().st_size <= LARGEST


def test_another_seed_is_another_run(tmp_path):
    explorer.write(tmp_path, seed=1)
    text = (tmp_path / explorer.FOLDER / "digits.js").read_text()
    about = json.loads(text.removeprefix("window.fmnExplorer = ").removesuffix(";\n"))
    [config] = replicates("quick", [explorer.NOISE], [1], ["augmented"])
    test_half = runs.obtain([config], progress=False)[0].split(explorer.SPLIT)[1]
    assert about["right"] == test_half.correct[test_half.kept].sum(axis=1).tolist()


def test_a_page_reads_the_record_without_loss(committed, config, test_half):
    kept, samples = len(test_half.kept), len(test_half.labels)
    probs = array(committed["probs"], "<f2", (kept, samples, test_half.classes))
    np.testing.assert_array_equal(probs, test_half.probs)
    predicted = array(committed["predicted"], np.uint8, (kept, samples))
    np.testing.assert_array_equal(predicted, test_half.predicted[test_half.kept])
    images = array(committed["images"], np.uint8, (samples, 8, 8))
    np.testing.assert_array_equal(images, load(config).eval_images.numpy()[test_half.index, 0])
    assert committed["labels"] == test_half.labels.tolist()
    assert committed["kept"] == test_half.kept.tolist()


def test_the_counts_are_the_definitions(committed, test_half):
    counts = {name: np.array(committed[name]) for name in ("right", "forgotten", "learned")}
    correct, samples = test_half.correct, len(test_half.labels)
    for name, score in (("forgotten", "forget_fraction"), ("learned", "learn_fraction")):
        shares = getattr(scores, score)(correct)[test_half.kept]
        np.testing.assert_allclose(counts[name] / samples, shares, atol=1e-12)
    final = correct[-1].sum()
    assert (counts["right"] + counts["learned"] - counts["forgotten"] == final).all()
    # The mix as Algorithm 1 nests it, a step at a time.
    last = fusion.fuse(test_half, fusion.single(test_half))
    for row, epoch in enumerate(test_half.kept.tolist()):
        window = fusion.fuse(test_half, fusion.around(test_half, epoch, explorer.WINDOW))
        for step in range(explorer.STEPS + 1):
            share = step / explorer.STEPS
            right = fusion.right_samples((1 - share) * last + share * window, test_half.labels)
            assert committed["mixed"][row][step] == right.sum()


def test_the_still_shows_what_is_wrong_at_the_end(committed, test_half):
    epoch, _ = committed["chosen"]
    still = (ROOT / explorer.FOLDER / "digits.svg").read_text()
    wrong = ~test_half.correct[-1]
    assert still.count("<text") == wrong.sum()
    assert still.count('stroke-width="3"') == (wrong & test_half.correct[epoch]).sum()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_its_mark(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from explorer import APPS

    assert [(ROOT / page).read_text().count(mark) for mark in APPS] == [1, 0]
