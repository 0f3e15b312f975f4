import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from book.build import execute
from fmnlib import InputError, runs
from fmnlib.__main__ import app
from fmnlib.config import Paused
from fmnlib.paper import grid
from fmnlib.paper.grid import cells, publish, published, status, work
from fmnlib.record import Result, RunRecord

ROOT = Path(__file__).parent.parent
TINY = {"epochs": 4, "train_samples": 100, "eval_samples": 100}
NOISY = {"noise": "symmetric", "noise_rate": 0.4}


@pytest.fixture
def tiny(monkeypatch, runs_root):
    """A grid of two cells of digits."""
    monkeypatch.setitem(grid.GRIDS, "tiny", grid.Grid("quick", [NOISY | TINY, TINY]))
    return cells("tiny", seeds=[0])


def test_the_papers_grid_begins_with_the_most_informative_cells():
    every = cells("paper")
    assert [cell.config.setting for cell in every[:3]] == ["sym40"] * 3
    assert {cell.config.model for cell in every} == {"resnet18"}
    assert len(every) == 6 * 3 + 3 * 3
    with pytest.raises(InputError, match="grid is 'peper'; choose one of paper, cpu"):
        cells("peper")


def test_a_grid_goes_on_where_it_was_stopped(tiny, tmp_path):
    assert {row["state"] for row in status(tiny)} == {"left"}
    assert publish(tiny, tmp_path) == 0
    with pytest.raises(Paused):
        work(tiny, device="cpu", workers=1, deadline=0.0)
    work(tiny[:1], device="cpu", workers=1)
    rows = status(tiny)
    assert [row["state"] for row in rows] == ["done"] * 6 + ["left"] * 6
    assert rows[3]["network"] == "digits convnet sym40 seed 0, Mean weights of 5 best"
    written = {p: p.stat().st_mtime_ns for p in runs.root().glob("*/record.npz")}
    work(tiny, device="cpu", workers=1)
    assert {row["state"] for row in status(tiny)} == {"done"}
    assert all(p.stat().st_mtime_ns == at for p, at in written.items())  # nothing twice


def test_scores_and_light_records_are_published(tiny, tmp_path):
    work(tiny, device="cpu", workers=1)
    assert publish(tiny, tmp_path) == 2
    content = published(tmp_path)
    assert list(content) == [cell.id for cell in tiny]
    results = [Result(**row) for cell in content.values() for row in cell["results"]]
    assert {result.setting for result in results} == {"memorising_sym40", "memorising_clean"}
    for cell in content.values():
        methods = {row["method"] for row in cell["results"]}
        assert {"single", "independent", "kf", "averaged_kf", "distilled_kf"} <= methods
        assert {"window", "best_probs", "averaged_best", "uniform", "knn"} <= methods
    assert {cell["provenance"]["device"][:3] for cell in content.values()} == {"CPU"}
    for cell in tiny:
        light = RunRecord.load(tmp_path / "records" / f"{cell.config.id}.npz")
        assert light.probs is None
        assert light.predicted.shape == (4, 100)
        weights = np.array(content[cell.id]["kf_weights"])
        assert weights.sum() == pytest.approx(1)
        shown = np.load(tmp_path / "forgotten" / f"{cell.config.id}.npz")
        assert shown["image"].shape == (len(shown["epochs"]), 1, 8, 8)
        assert (shown["epochs"] > 0).all()
        assert (shown["predicted"] != shown["label"]).all()


def test_forgotten_images_are_those_right_for_the_most_epochs_of_the_first_seed(
    monkeypatch, runs_root, tmp_path
):
    monkeypatch.setitem(grid.GRIDS, "tiny", grid.Grid("quick", [NOISY | TINY]))
    both = cells("tiny", seeds=[0, 1])
    work(both, device="cpu", workers=1)
    assert publish(both, tmp_path) == 2
    [path] = (tmp_path / "forgotten").iterdir()
    assert path.stem == both[0].id
    assert len(list((tmp_path / "records").iterdir())) == 2
    shown, record = np.load(path), RunRecord.load(runs.folder(both[0].config))
    lost = ~record.correct[-1]
    counts = np.sort(record.correct[:, lost].sum(axis=0))[::-1]
    assert shown["epochs"].tolist() == counts[counts > 0][:12].tolist()


def test_cells_that_another_machine_publishes_meanwhile_stay(tiny, tmp_path, monkeypatch):
    work(tiny, device="cpu", workers=1)
    compare = grid.compare.compare

    def slow(*args, **options):
        monkeypatch.setattr(grid.compare, "compare", compare)
        assert publish(tiny[1:], tmp_path) == 1  # the other machine
        return compare(*args, **options)

    monkeypatch.setattr(grid.compare, "compare", slow)
    assert publish(tiny[:1], tmp_path) == 2
    assert set(published(tmp_path)) == {cell.id for cell in tiny}


def test_what_lists_networks_reads_no_probabilities(tiny):
    work(tiny[:1], device="cpu", workers=1)
    (runs.folder(tiny[0].config) / "probs.npy").write_bytes(b"damaged")
    assert [row["state"] for row in runs.listing()] == ["complete"] * 6
    assert [row["state"] for row in status(tiny[:1])] == ["done"] * 6


def test_a_finished_cell_is_searched_once(tiny, monkeypatch):
    work(tiny, device="cpu", workers=1)
    searched = []
    monkeypatch.setattr(grid, "knowledge_fusion", searched.append)
    assert {row["state"] for row in status(tiny)} == {"done"}
    assert not searched


# ---------------------------------------------------------------- the pages that show a grid


def page(srcdir, name, results):
    """What the directive needs of Sphinx."""
    env = SimpleNamespace(srcdir=srcdir)
    options = {"results": results, "caption": "", "name": ""}
    return SimpleNamespace(arguments=[name], options=options, env=env, parse_text_to_nodes=str)


def test_a_grid_without_a_measured_cell_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from grids import GridTable

    assert GridTable.run(page(tmp_path, "paper", "gpu")) == "No cell of this grid is measured yet."


def test_cells_of_older_versions_are_read_under_the_condition_of_their_config(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from grids import headings, scored, shared, summary

    base = {"item": "x", "split_seed": 0, "accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    base |= {"networks": 1, "train_seconds": 1.0, "method": "kf"}
    old = [base | {"seed": 0, "setting": "sym40"}]
    new = [base | {"seed": 1, "setting": "memorising_sym40"}]
    new += [row | {"method": "knn"} for row in new]
    rows = shared([scored(old, "sym40"), scored(new, "sym40")])
    assert {m: numbers["n"] for m, numbers in summary(rows).items()} == {"kf": 2}
    keys = [("cifar100", "resnet18", augment, "sym40") for augment in ("crop_flip", "none")]
    assert headings(keys) == ["augmented 40% symmetric", "memorising 40% symmetric"]


# jupyter_client leaves the event loop of a thread open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook_says_of_how_many_seeds_a_number_is(tmp_path, runs_root):
    content, light = published(ROOT / "results" / "cpu"), tmp_path / "records"
    shutil.copytree(ROOT / "results" / "cpu" / "forgotten", tmp_path / "forgotten")
    light.mkdir()
    every = cells("cifar")
    first = every[0].id
    two = {}
    for seed, cell in enumerate(every[:2]):
        source = ROOT / "results" / "cpu" / "records" / f"{first}.npz"
        shutil.copy(source, light / f"{cell.id}.npz")
        rows = [row | {"seed": seed, "setting": "sym40"} for row in content[first]["results"]]
        two[cell.id] = {"provenance": content[first]["provenance"], "results": rows}
    two[every[1].id]["results"] = [row for row in rows if row["method"] != "window"]
    two[first]["kf_weights"] = content[first]["kf_weights"]
    (tmp_path / "results.json").write_text(json.dumps({"cells": two}))
    copy = Path(shutil.copy(ROOT / "notebooks" / "12_cifar100.ipynb", tmp_path))
    execute(copy, results=str(tmp_path), seeds=[0, 1])
    ran = {cell["id"]: cell for cell in json.loads(copy.read_text())["cells"]}
    for name in ("table", "differences", "weights"):
        lines = json.dumps(ran[name]["outputs"]).split("\\n")
        assert any("(n = 1)" in line for line in lines), name
    published_rows = json.dumps(ran["publish"]["outputs"])
    assert "early_stopping" in published_rows
    assert "window" not in published_rows  # of every seed or none: differences pair them


def test_what_another_machine_published_stays_and_is_not_made_again(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(grid, "cells", lambda name: tiny)
    command = ["grid", "tiny", "--workers", "1", "--device", "cpu", "--json", "--out"]
    work(tiny[:1], device="cpu", workers=1)
    assert publish(tiny, tmp_path) == 1
    elsewhere = published(tmp_path)
    assert elsewhere[tiny[0].id].pop("whole")  # older versions wrote whole cells alone, unsaid
    (tmp_path / "results.json").write_text(json.dumps({"cells": elsewhere}))
    monkeypatch.setenv("FMN_RUNS", str(tmp_path / "another-machine"))
    app([*command, str(tmp_path), "--status"], result_action="return_value")
    states = [row["state"] for row in json.loads(capsys.readouterr().out)]
    assert states == ["published"] * 6 + ["left"] * 6
    app([*command, str(tmp_path)], result_action="return_value")
    states = [row["state"] for row in json.loads(capsys.readouterr().out)]
    assert states == ["published"] * 6 + ["done"] * 6
    content = published(tmp_path)
    assert list(content) == [cell.id for cell in tiny]
    assert content[tiny[0].id] == elsewhere[tiny[0].id]


def test_a_cell_without_its_independent_networks_is_published_and_made_whole_later(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(grid, "cells", lambda name: tiny[:1])
    work(tiny[:1], device="cpu", workers=1)
    [last], [student] = (list(runs.root().glob(name)) for name in ("*-s2000-*", "*-kf-*"))
    last.rename(tmp_path / "not yet")
    student.rename(tmp_path / "student")
    assert publish(tiny, tmp_path) == 0
    (tmp_path / "student").rename(student)
    assert publish(tiny, tmp_path) == 1
    part = published(tmp_path)[tiny[0].id]
    assert not part["whole"]
    command = ["grid", "tiny", "--workers", "1", "--json", "--out", str(tmp_path)]
    app([*command, "--status"], result_action="return_value")
    states = [row["state"] for row in json.loads(capsys.readouterr().out)]
    assert states == ["done"] * 5 + ["left"]
    app(command, result_action="return_value")
    whole = published(tmp_path)[tiny[0].id]
    assert whole["whole"]
    alone = [row for row in whole["results"] if row["method"] != "independent"]
    assert len(alone) == len(whole["results"]) - 1
    assert alone == part["results"]
    last.rename(tmp_path / "gone")
    assert publish(tiny, tmp_path) == 1
    assert published(tmp_path)[tiny[0].id] == whole  # a part takes the place of nothing


@pytest.mark.parametrize("content", ["{}", "[]", '{"cells": ', '{"cells": {"a": 0.5}}'])
def test_damaged_results_are_refused_before_the_work(tiny, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"results\.json holds no results .*; move it away"):
        published(tmp_path)
    with pytest.raises(InputError, match="which is a file; give a folder"):
        published(tmp_path / "results.json")


def test_workers_are_one_or_more(tiny):
    with pytest.raises(InputError, match="workers is -1; allowed is at least 1"):
        work(tiny, device="cpu", workers=-1)


def test_the_status_writes_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, "cells", lambda name: tiny)
    words = ["grid", "tiny", "--status", "--json", "--out", str(tmp_path / "new")]
    app(words, result_action="return_value")
    assert not (tmp_path / "new").exists()


def test_the_command_prints_what_is_left(tiny, capsys, monkeypatch):
    monkeypatch.setattr(grid, "cells", lambda name: tiny)
    app(["grid", "tiny", "--status", "--json"], result_action="return_value")
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 12
    assert rows[0] == {"network": "digits convnet sym40 seed 0, run", "state": "left"}


def test_without_ray_the_command_says_what_to_install(fmn, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it is an error, installed or not
    told = "fmn: ray is not installed; pip install 'fmnlib[cluster]'\n"
    assert fmn("grid", "cpu", "--engine", "ray")[::2] == (2, told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--engine ray --workers 2", "workers is not for the engine ray; leave it out"),
        ("--address auto", "address is not for the engine local; leave it out"),
        ("--engine ray --gpus-per-run 2", "gpus_per_run is 2.0; allowed is 0 to 1"),
        ("--engine ray --gpus-per-run nan", "gpus_per_run is nan; allowed is 0 to 1"),
    ],
)
def test_options_of_the_other_engine_are_refused(fmn, words, told):
    assert fmn("grid", "cpu", *words.split())[::2] == (2, f"fmn: {told}\n")
