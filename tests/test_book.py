"""The book as text: its examples run, its numbers come from files, its sources are whole."""

import contextlib
import csv
import dataclasses
import gc
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from docutils import nodes
from PIL import Image

from book import build as book
from book import explorer, film
from fmnlib import InputError, RunConfig, runs
from fmnlib.paper.publish import collect, publish
from fmnlib.record import RunRecord

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "book").glob("*.md"))
STEPS = ("fmn book", "make browser-test", "upload-pages-artifact")  # in this order


@pytest.mark.parametrize(
    "page",
    # test_guide follows the first, test_exercises runs the others
    [page for page in PAGES if page.stem not in ("your_model", "exercises", "cheat_sheet")],
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
    words = "commit date device threads python torch numpy".split()
    origin = {word: f"its {word}" for word in words} | {"changed": False, "seconds": 1.5}
    record = RunRecord.from_arrays(np.array([[[0.5, 0.5]]]), [0])
    record = type(record)(**{**vars(record), "provenance": origin})
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **about: shown.append((data, about))
    )
    publish("item", {"sym40": {"kf": {"mean": 1.0, "sem": 0.5, "n": 3}}}, [record, record])
    [(data, about)] = shown.copy()
    output = nbformat.v4.new_output("display_data", data, metadata=about["metadata"])
    cell = nbformat.v4.new_code_cell("1", outputs=[output])
    picture = nbformat.v4.new_output("display_data", {"image/png": "AAAA"})
    about = {"fmnlib": {"save_figure": "all.png"}}
    drawn = nbformat.v4.new_code_cell("2", outputs=[picture], metadata=about)
    notebook = nbformat.v4.new_notebook(cells=[cell, drawn])
    [published] = collect(notebook)
    assert published["origin"] == origin | {"runs": 2, "seconds": 3.0}
    publish("item", {}, [record], [origin | {"commit": "another", "changed": True}])
    about = shown[1][1]["metadata"]["fmnlib"]["origin"]  # what comes on top counts as no run
    assert about["commit"] == "another, its commit"
    assert (about["changed"], about["runs"], about["seconds"]) == (True, 1, 1.5)
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "07_item.ipynb")
    book.gather(tmp_path)
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["item"]["sym40"]["kf"]["mean"] == 1
    provenance = json.loads((tmp_path / "results" / "provenance.json").read_text())
    assert provenance["item"]["notebook"] == "07_item"
    assert provenance["item"]["figures"] == ["all.png"]
    assert (tmp_path / "results" / "figures" / "all.png").read_bytes() == bytes(3)


def test_the_committed_numbers_are_those_of_the_committed_outputs(tmp_path):
    staging = book.stage(tmp_path / "staging")
    for name in ("summary.json", "provenance.json"):
        (staging / "results" / name).unlink()
    shutil.rmtree(staging / "results" / "figures")
    book.gather(staging)
    for path in (staging / "results").rglob("*.*"):
        committed = ROOT / "results" / path.relative_to(staging / "results")
        assert path.read_bytes() == committed.read_bytes(), path.name
    figures = {path.name for path in (ROOT / "results" / "figures").iterdir()}
    assert figures == {path.name for path in (staging / "results" / "figures").iterdir()}


def test_training_anew_says_first_how_long_it_takes(tmp_path, runs_root, monkeypatch):
    quick = RunConfig.of_profile("quick")
    [path] = [p for p in runs.REFERENCE.glob("*.npz") if p.stem == quick.id]
    for name in ("one.npz", "two.npz"):
        shutil.copy(path, tmp_path / name)
    monkeypatch.setattr("fmnlib.runs.REFERENCE", tmp_path)
    told = re.fullmatch(
        r"training 2 networks, as many as are committed, (\d+) at a time: about (\d+) minutes",
        book.forecast(),
    )
    places = len(runs.local_devices("auto"))
    assert int(told[1]) == places
    assert not list(runs_root.glob("*"))
    record = RunRecord.load(path)
    share = record.epochs // 6 / record.epochs
    slower = 100 * record.provenance["seconds"] * share
    trained = dataclasses.replace(record, provenance=record.provenance | {"seconds": slower})
    monkeypatch.setattr(runs, "obtain", lambda some, **options: [trained for _ in some])
    minutes = 2 * 100 * record.provenance["seconds"] / places / 60
    assert book.forecast().endswith(f"about {minutes:.0f} minutes")
    more = book.forecast([0, 7, 8, 9])  # all that is committed is of seed 0
    assert more.startswith("training about 6 networks")
    assert more.endswith(f"about {3 * minutes:.0f} minutes")
    assert book.forecast([0]).startswith("these seeds are committed")


def test_every_notebook_says_where_it_was_measured():
    about = json.loads((ROOT / "results" / "provenance.json").read_text()).values()
    every = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {item["notebook"] for item in about} == every


def test_notebooks_to_run_are_named_by_their_beginnings(tmp_path):
    staging = book.stage(tmp_path / "staging")
    assert [path.stem for path in book._named(staging, ["05", "00"])] == [
        "00_quickstart",
        "05_clean_data",
    ]
    with pytest.raises(InputError, match="no notebook begins with '99'; there are 00_quick"):
        book._named(staging, ["05", "99"])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small one: two notebooks to run, and two with the numbers of the README's table."""
    for name in ("notebooks", "results", explorer.FOLDER, film.FOLDER):
        (tmp_path / name).mkdir(parents=True)
    for name in ("_toc.yml", "_config.yml", "README.md", "notebooks/06_label_noise.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "notebooks" / "12_cifar100.ipynb", tmp_path / "notebooks")
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    for name in ("00_first", "01_second"):
        cell = nbformat.v4.new_code_cell(
            "seed = 0\nfresh = False", metadata={"tags": ["parameters"]}
        )
        cells = [
            cell,
            nbformat.v4.new_code_cell("print('a', end='', flush=True); print('run', fresh)"),
        ]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(book, "REPOSITORY", tmp_path)
    monkeypatch.setattr(book, "_fingerprint", lambda: "0")
    monkeypatch.setattr(book, "render", lambda staging, output, **_: staging)  # takes a minute
    return tmp_path


def printed(path):
    outputs = json.loads(path.read_text())["cells"][-1]["outputs"]
    return ["".join(output["text"]) for output in outputs]


# jupyter_client leaves the event loop of a thread open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_single_notebooks_are_run_and_bring_the_working_tree_up_to_date(repository):
    readme = repository / "README.md"
    readme.write_text(readme.read_text().replace("| Final network |", "| Another |"))
    staging = book.build(rerun=["01"])
    assert printed(repository / "notebooks" / "01_second.ipynb") == ["arun False\n"]
    assert printed(staging / "notebooks" / "00_first.ipynb") == []
    assert readme.read_text() == (ROOT / "README.md").read_text()
    summary = json.loads((repository / "results" / "summary.json").read_text())
    assert {"label_noise", "cifar100"} == summary.keys()
    gc.collect()  # here, where the warning is expected


def test_the_cached_book_runs_nothing_and_leaves_the_working_tree(repository):
    staging = book.build(cached=True)
    for name in ("00_first", "01_second"):
        assert printed(staging / "notebooks" / f"{name}.ipynb") == []
    assert (staging / "results" / "summary.json").exists()
    assert not list((repository / "results").iterdir())


def test_a_book_is_built_in_one_way(repository):
    with pytest.raises(InputError, match="cached and seeds are given; give one of fresh, cached"):
        book.build(cached=True, seeds=[5])
    with pytest.raises(InputError, match="no notebook begins with '7'; there are 00_first to 12"):
        book.build(rerun=["7"])
    with pytest.raises(InputError, match="seeds are 5, 7, 5; give each once"):
        book.build(seeds=[5, 7, 5])


def test_a_build_leaves_what_was_edited_meanwhile_and_bears_no_second_one(repository, monkeypatch):
    other = repository / "notebooks" / "00_first.ipynb"

    def execute(notebook, **parameters):
        assert notebook.stem == "01_second"
        other.write_text(other.read_text().replace("seed = 0", "seed = 5"))
        with pytest.raises(InputError, match="another `fmn book` is at work in this folder"):
            book.build(cached=True)

    monkeypatch.setattr(book, "execute", execute)
    book.build(rerun=["01"])
    assert "seed = 5" in other.read_text()


def test_runs_of_other_seeds_are_not_committed(repository, monkeypatch, tmp_path):
    committed = tmp_path / "reference"
    committed.mkdir()
    [path] = runs.REFERENCE.glob(f"{RunConfig.of_profile('quick').id}.npz")
    record = RunRecord.load(path)
    monkeypatch.setattr(runs, "REFERENCE", committed)

    def execute_all(staging, *, fresh, seeds=()):
        for seed in seeds or [0]:
            made = dataclasses.replace(
                record, config=dataclasses.replace(record.config, seed=seed)
            )
            made.save(runs.folder(made.config) / "record.npz")

    monkeypatch.setattr(book, "forecast", str)
    monkeypatch.setattr(book, "_execute_all", execute_all)
    for moving in (explorer, film):
        monkeypatch.setattr(moving, "write", lambda *_, **options: [])
    book.build(seeds=[7])
    book.build(update=True)
    assert {RunRecord.load(path).config.seed for path in committed.iterdir()} == {0}


def test_a_notebook_that_fails_is_named_with_its_error(tmp_path):
    copy = Path(shutil.copy(ROOT / "notebooks" / "00_quickstart.ipynb", tmp_path))
    before = copy.read_bytes()
    with pytest.raises(
        InputError, match="00_quickstart.ipynb failed in cell .*: .*noise_rate is 7"
    ):
        book.execute(copy, noise_rate=7.0)
    assert copy.read_bytes() == before


def test_what_the_book_cannot_tell_breaks_the_build(tmp_path, capfd):
    """A number that does not exist, an outcome that has changed, a table without a caption."""
    staging = book.stage(tmp_path / "staging")
    two = "format: jb-book\nroot: book/references\nchapters:\n- file: notebooks/05_clean_data\n"
    (staging / "_toc.yml").write_text(two)  # seconds instead of a minute
    page = staging / "book" / "references.md"
    lines = ["{result}`label_noise.augmented_sym40.magic`"]
    lines += ["{given}`label_noise.memorising_sym40.early_stopping.single opposite`"]
    page.write_text(page.read_text() + "\n" + "\n".join(lines) + "\n")
    notebook = staging / "notebooks" / "05_clean_data.ipynb"
    notebook.write_text(notebook.read_text().replace('"table":', '"tabel":'))
    with pytest.raises(InputError, match="the book does not build"):
        book.render(staging, tmp_path / "out")
    told = capfd.readouterr().err
    assert "results/summary.json has no 'label_noise.augmented_sym40.magic'" in told
    assert (
        "no longer label_noise.memorising_sym40.early_stopping.single opposite, but found" in told
    )
    assert "of 05_clean_data shows a table without a caption" in told


def test_with_other_seeds_a_sentence_that_does_not_hold_says_so(tmp_path, capfd):
    staging = book.stage(tmp_path / "staging")
    (staging / "_toc.yml").write_text("format: jb-book\nroot: book/references\n")
    page = staging / "book" / "references.md"
    given = "{given}`label_noise.memorising_sym40.early_stopping.single "
    page.write_text(f"{page.read_text()}\nIt pays.{given}found`\nIt costs.{given}opposite`\n")
    html = book.render(staging, tmp_path / "out", strict=False).parent / "book" / "references.html"
    told = r"It pays.\s+It costs.<strong> \[Does not hold in this build: "
    assert re.search(told, html.read_text())
    assert (
        "no longer label_noise.memorising_sym40.early_stopping.single opposite, but found"
        in capfd.readouterr().err
    )


def test_workflows_name_no_secret_and_publish_only_what_the_browser_has_seen():
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github").rglob("*.yml")}
    assert set(workflows) == {"colab", "pages", "test"}
    assert not any("secrets" in text for text in workflows.values())
    jobs = yaml.safe_load(workflows["pages"])["jobs"]
    steps = [step.get("run", step.get("uses", "")) for step in jobs["build"]["steps"]]
    order = [next(n for n, step in enumerate(steps) if word in step) for word in STEPS]
    assert order == sorted(order)
    assert jobs["deploy"]["needs"] == "build"


def test_the_papers_are_cited_alike_everywhere():
    """By the page on citing, the bibliography and CITATION.cff."""
    page = (ROOT / "book" / "cite.md").read_text()
    bibliography = (ROOT / "book" / "references.bib").read_text()
    for paper in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]:
        identifier = paper.get("doi") or paper["identifiers"][0]["value"]
        for text in (page, bibliography):
            assert paper["title"] in text
            assert identifier in text
            for author in paper["authors"]:
                assert f"{author['family-names']}, {author['given-names']}" in text


def test_every_module_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "book").glob("api*.md"))
    shown = re.findall(r"automodule:: fmnlib\.([\w.]+)", pages)
    files = [path.relative_to(ROOT / "fmnlib") for path in (ROOT / "fmnlib").rglob("[a-z]*.py")]
    assert sorted(shown) == sorted(".".join(file.with_suffix("").parts) for file in files)


def test_a_claim_is_found_where_its_interval_is_above_zero(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from claims import in_words

    from results import paired

    a, b = {"seeds": [3.0, 5.0, 4.0]}, {"seeds": [1.0, 2.5, 2.5]}
    mean, low, high = paired([a, b], [1, -1])
    half = 4.3027 * np.std([2, 2.5, 1.5], ddof=1) / np.sqrt(3)  # Student's t of 2 degrees
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    above, below = ("x", 3, 2.0, 1.0, 3.0), ("y", 3, -2.0, -3.0, -1.0)
    zero, small = ("z", 3, 0.0, -1.0, 1.0), ("s", 3, 0.1, -0.2, 0.4)
    one, two = ("o", 1, 1.0, np.nan, np.nan), ("t", 2, 2.0, 1.0, 3.0)
    assert in_words([above], "more") == "**found**"
    assert in_words([above, below], "more") == "**found** at x; **the opposite** at y"
    assert in_words([zero], "more") == "**not clear**"
    assert in_words([small], "more") == "**equal within 0.5 points**"
    assert in_words([one], "more") == "**one seed, above zero**"
    assert in_words([two], "more") == "**found (n = 2)**"
    assert in_words([small, above], "no less") == "**no loss of 0.5 points**"
    assert in_words([zero, below], "no less") == "**not clear** at z; **the opposite** at y"


def test_every_claim_names_numbers_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from claims import expand, with_grid

    summary = json.loads((ROOT / "results" / "summary.json").read_text())
    grid = json.loads((ROOT / "results" / "cpu" / "results.json").read_text())
    summary = with_grid(summary, grid["cells"])
    text = (ROOT / "results" / "published" / "claims.csv").read_text()
    for row in csv.DictReader(text.splitlines()):
        assert row["expects"] in {"more", "no less"}
        assert row["noise"] in {"", "clean", "noisy"}
        assert expand(row, summary), row["claim"]
        for key in re.findall(r"[a-z]\S+", row["differences"].replace(";", " ")):
            item, setting, method = key.split(".", 2)
            rows = summary[item].values() if setting == "*" else [summary[item][setting]]
            assert any(method in numbers for numbers in rows), key
    for place in ("cifar100.*.uniform", "beyond.*.greedy", "fashion_mnist.*.kf"):
        assert place in text


def test_a_star_stands_for_every_condition_that_has_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from claims import expand

    both, one = {"kf": {"seeds": [2.0]}, "swa": {"seeds": [1.0]}}, {"kf": {"seeds": [3.0]}}
    summary = {"x": {"augmented_clean": both, "augmented_sym40": both, "memorising_sym40": one}}
    claim = {"differences": "x.*.kf - x.*.swa", "noise": "noisy"}
    found = expand(claim, summary)
    assert found == [("x", "augmented_sym40", [both["kf"], both["swa"]], [1, -1])]
    settings = [setting for _, setting, *_ in expand(claim | {"noise": ""}, summary)]
    assert settings == ["augmented_clean", "augmented_sym40"]


def test_an_item_of_two_seeds_says_so(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from dashboard import Dashboard

    (tmp_path / "results").mkdir()
    content = {
        item: {"clean": {m: {"seeds": [v] * n} for m, v in (("kf", 3.0), ("single", 1.0))}}
        for item, n in (("cifar100", 2), ("label_noise", 5))
    }
    (tmp_path / "results" / "summary.json").write_text(json.dumps(content))
    env = SimpleNamespace(srcdir=tmp_path, note_dependency=lambda path: None)
    table = SimpleNamespace(env=env, theirs=lambda key: None)
    table.ours = lambda key: Dashboard.ours(table, key)
    keys = "cifar100.clean.kf.single; label_noise.clean.kf.single"
    item = dict.fromkeys(("notebook", "paper", "item", "shows", "theirs"), "")
    shown = Dashboard.row(table, item | {"ours": keys})[3]
    cifar, digits = shown.split("; ")
    assert cifar.startswith("CIFAR-100: +2.0 [2.0")
    assert cifar.endswith("(n = 2)")
    assert "n = " not in digits


def test_other_seeds_reach_the_explorer_and_the_film_and_break_no_build(repository, monkeypatch):
    told = []
    monkeypatch.setattr(book, "forecast", str)
    monkeypatch.setattr(book, "_execute_all", lambda staging, **options: None)
    for moving in (explorer, film):
        monkeypatch.setattr(moving, "write", lambda staging, **options: told.append(options) or [])
    monkeypatch.setattr(book, "render", lambda staging, output, strict: told.append(strict))
    book.build(seeds=[7, 8])
    book.build()
    usual = {"seed": 0, "fresh": False}
    assert told == [usual | {"seed": 7}, usual | {"seed": 7}, False, usual, usual, True]


# jupyter_client leaves the event loop of a thread open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_seeds_reach_every_notebook_that_trains(tmp_path):
    (tmp_path / "notebooks").mkdir()
    sources = {
        "1_many": "seeds = [0, 1]\nfresh = True",
        "2_one": "seed = 0\nfresh = True",
        "3_grid": "results = 'here'\nseeds = [0, 1]\nfresh = False",
    }
    for name, source in sources.items():
        about = {"tags": ["parameters"]}
        cells = [nbformat.v4.new_code_cell(source, metadata=about)]
        shown = "print([v for k, v in sorted(globals().items()) if k in ('seed', 'seeds')])"
        cells.append(nbformat.v4.new_code_cell(shown))
        kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    book._execute_all(tmp_path, fresh=False, seeds=[7, 8])
    printed = {}
    for name in sources:
        cells = json.loads((tmp_path / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        printed[name] = "".join(cells[-1]["outputs"][0]["text"]).strip()
    assert printed == {"1_many": "[[7, 8]]", "2_one": "[7]", "3_grid": "[[0, 1]]"}
    gc.collect()  # here, where the warning is expected


def test_an_origin_of_several_commits_and_days_is_told_in_short(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from origins import in_short

    one = {"commit": "1a", "changed": True, "device": "CPU", "date": "2026-11-22"}
    assert in_short(one) == "commit 1a with local changes, on CPU, on 2026-11-22"
    more = {"commit": "1a, 2b", "changed": False, "date": "2026-11-22, 2026-11-24, 2026-11-28"}
    assert in_short(one | more) == "2 commits, on CPU, 2026-11-22 to 2026-11-28"
    assert in_short(one | {"changed": False, "device": "", "date": ""}) == "commit 1a"


def test_the_names_of_an_index_stand_above_their_columns(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from origins import table_of

    index = pd.MultiIndex.from_product([["a", "b"], ["x", "y"]])
    shown = pd.DataFrame({"n": range(4)}, index=index)._repr_html_()
    found = table_of(shown, "").findall(nodes.row)
    rows = [[entry.astext() for entry in row.findall(nodes.entry)] for row in found]
    assert rows[1:] == [["a", "x", "0"], ["", "y", "1"], ["b", "x", "2"], ["", "y", "3"]]


def test_a_table_of_results_says_how_many_seeds_and_which_regime(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from results import ResultsTable

    options = {"settings": "augmented_sym40, memorising_sym40", "methods": "single, kf"}
    page = SimpleNamespace(options=options | {"caption": "", "name": "x"})
    cells = {
        "augmented_sym40": {"single": "1.0 ± 0.1", "kf": "2.0 ± 0.1"},
        "memorising_sym40": {"single": "4.0", "kf": "3.0"},
    }
    seeds = {"augmented_sym40": "2", "memorising_sym40": "1"}
    rows = [line for line in ResultsTable.table(page, cells, seeds) if "," in line]
    assert rows == [
        'method,"symmetric 40%, augmented","symmetric 40%, without augmentation"',
        "training seeds,2,1",
        "Final network,1.0 ± 0.1,**4.0**",
        "KF (∞),**2.0 ± 0.1**,3.0",
    ]
    page.options["settings"] = "augmented_sym40"
    rows = [line for line in ResultsTable.table(page, cells) if "," in line]
    assert rows[:2] == ['method,"symmetric 40%"', "Final network,1.0 ± 0.1"]


def test_a_comparison_is_a_verb_that_follows_its_interval(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from fmnlib.stats import outcome
    from results import WORDS

    words = {
        (2.0, 1.0, 3.0): "beats",
        (-2.0, -3.0, -1.0): "loses to",
        (0.1, -0.2, 0.3): "is within 0.5 points of",
        (0.1, -2.0, 2.0): "does not clearly differ from",
        (7.7, np.nan, np.nan): "is, in one seed, 7.7 points above",
        (-0.5, np.nan, np.nan): "is, in one seed, 0.5 points below",
    }
    for ends, verb in words.items():
        assert WORDS["versus"](ends, outcome(*ends[1:])) == verb


def test_a_figure_of_few_colours_becomes_smaller_and_a_photograph_stays(tmp_path):
    def png(pixels):
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", dpi=(180, 180))
        return file.getvalue()

    ramp = np.linspace(0, 255, 300).astype(np.uint8)
    lines = np.full((200, 300, 4), 255, np.uint8)
    lines[90:110, :, :3] = np.stack([ramp // 40 * 40, 0 * ramp, 255 - ramp // 40 * 40], 1)
    small = book.with_few_colours(png(lines))
    assert len(small) < len(png(lines))
    with Image.open(io.BytesIO(small)) as image:
        np.testing.assert_array_equal(image.convert("RGBA"), lines)
        assert image.info["dpi"] == pytest.approx((180, 180), abs=0.1)
    photograph = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    assert book.with_few_colours(png(photograph)) == png(photograph)
    sky = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:200, None], 300), lines[..., 2]], 2)
    sky |= photograph & 3  # with grain, so that few colours would take less
    assert book.with_few_colours(png(sky)) == png(sky)  # in few colours it would have bands
    lines[:10, :, 3] = 0  # what shows through would be lost
    assert book.with_few_colours(png(lines)) == png(lines)
