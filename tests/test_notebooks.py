"""Every notebook really trains: fresh, small, by papermill, as `fmn book` runs it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from book.build import execute
from fmnlib import InputError, RunRecord, runs
from fmnlib.training import train

ROOT = Path(__file__).parent.parent
FEW = {"epochs": 6, "train_samples": 200}
SMALL = {
    "00_quickstart": {},
    "01_local_overfitting": {"seeds": [0, 1]},
    "02_double_descent": {"seeds": [0, 1]},
    "03_forget_fraction": {"widths": [0.5], "amounts": [100], "recipes": {}, "seeds": [0]},
    "04_linear_theory": {
        "settings": [["symmetric", 0.4]],
        "seeds": [0, 1],
        "starts": 3,
        "rounds": 50,
    },
    "05_clean_data": {"few": 100, "seeds": [0, 1], "splits": [0]},
    "06_label_noise": {
        "settings": [["symmetric", 0.4]],
        "seeds": [0, 1],
        "splits": [0],
    },
    "07_training_methods": {
        "changes": FEW | {"epochs": 8},  # a tail is a quarter of them
        "settings": [["symmetric", 0.4]],
        "networks": 2,
        "seeds": [0, 1],
        "splits": [0],
    },
    "08_distillation": {
        "settings": [["symmetric", 0.4]],
        "losses": [{}, {"temperature": 1}],
        "views": [0, 2],
        "seeds": [0, 1],
        "splits": [0],
    },
    "09_ablations": {
        "settings": [["symmetric", 0.4]],
        "windows": [0, 1],
        "kept": [0.4, 1.0],
        "val_sizes": [20],
        "seeds": [0],
        "splits": [0],
    },
    "10_beyond": {
        "settings": [["symmetric", 0.4], ["asymmetric", 0.4]],
        "seeds": [0, 1],
        "splits": [0],
        "greedy_size": 5,
    },
    "11_your_own_model": {},
    "13_wrong_labels": {
        "settings": [["symmetric", 0.4], ["asymmetric", 0.4]],
        "taught": ["sym40"],
        "seeds": [0, 1],
        "splits": [0],
    },
    "14_text": {"samples": 300, "held_out": 200, "epochs": 4, "seeds": [0, 1]},
}
GRID = "12_cifar100"  # trains for a day, or reads what was trained
ITS_OWN = {"11_your_own_model", "14_text"}  # train in loops and folders of their own


@pytest.fixture(autouse=True)
def one_core(worker_id):
    """A notebook that may use one core trains in its own process, and starts no others."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    number = 0 if worker_id == "master" else int(worker_id.removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


def test_every_notebook_is_tried():
    assert {*SMALL, GRID} == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_notebook_of_the_grid_reads_its_results(tmp_path, runs_root):
    copy = Path(shutil.copy(ROOT / "notebooks" / f"{GRID}.ipynb", tmp_path))
    with pytest.raises(InputError, match="holds no results; set fresh, or clone"):
        execute(copy, results=str(tmp_path))
    execute(copy, seeds=[0])
    assert not list(runs_root.glob("*"))


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_train_afresh(name, tmp_path, runs_root):
    copy = Path(shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path))
    few = {} if name == "14_text" else {"changes": FEW}
    execute(copy, fresh=True, **few | SMALL[name])
    cells = json.loads(copy.read_text())["cells"]
    [injected] = [c for c in cells if "injected-parameters" in c["metadata"].get("tags", [])]
    assert "hide-input" in injected["metadata"]["tags"]
    assert name in ITS_OWN or len(list(runs_root.glob("*/record.npz"))) >= 2


def test_a_notebook_runs_on_real_images(tmp_path, real_data):
    copy = Path(shutil.copy(ROOT / "notebooks" / "00_quickstart.ipynb", tmp_path))
    few = {"epochs": 5, "train_samples": 400, "eval_samples": 600, "width": 0.5}
    execute(copy, profile="standard", fresh=True, changes=few)
    cells = json.loads(copy.read_text())["cells"]
    # A network that still learns has forgotten nothing that is worth a pick.
    assert "no epoch knows enough" in json.dumps([c.get("outputs") for c in cells])


def test_a_parameter_that_a_notebook_lacks_is_refused(tmp_path):
    copy = Path(shutil.copy(ROOT / "notebooks" / "00_quickstart.ipynb", tmp_path))
    before = copy.read_bytes()
    with pytest.raises(InputError, match="00_quickstart.ipynb has no parameter 'seedz'; it has"):
        execute(copy, seedz=3)
    assert copy.read_bytes() == before


def test_a_committed_record_is_what_training_gives(tmp_path):
    # Rounding differs between machines and grows while a network trains: the first epochs agree
    # closely, the last ones in what they show.
    files = sorted(runs.REFERENCE.glob("digits-convnet-sym40-s0-*.npz"))
    committed = next(r for r in map(RunRecord.load, files) if len(r.kept) == r.epochs)
    again = train(committed.config, tmp_path, device="cpu", progress=False)
    np.testing.assert_array_equal(again.labels, committed.labels)
    np.testing.assert_allclose(again.accuracy[:2], committed.accuracy[:2], atol=0.05)
    np.testing.assert_allclose(
        again.accuracy[-10:].mean(), committed.accuracy[-10:].mean(), atol=0.06
    )
    np.testing.assert_allclose(
        again.curves["train_loss"][:3], committed.curves["train_loss"][:3], rtol=0.05
    )
