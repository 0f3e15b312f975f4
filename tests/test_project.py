"""What holds the project together: who imports whom, one address, notebooks to be trusted."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from fmnlib import InputError
from fmnlib.study.book import headline, readme_with
from fmnlib.study.plots import METHODS
from fmnlib.study.publish import collect

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SUMMARY = json.loads((ROOT / "results" / "summary.json").read_text())

# Who may import whom, and what from outside: the table in CONTRIBUTING.md.
OURS = {
    # fmnlib/
    "config": "",
    "files": "",
    "record": "config files",
    "noise": "config",
    "scores": "",
    "theory": "config",
    "overlap": "scores",
    "plane": "",
    "shares": "",
    "fusion": "config files record",
    "search": "config fusion record scores shares",
    "selection": "config fusion record",
    "stats": "config record",
    "intervals": "",
    "gains": "fusion intervals record",
    "diagnosis": "fusion intervals record scores search",
    "commands": (
        "config diagnosis external files fusion gains intervals record report runs "
        "scores search tracker"
    ),
    # fmnlib/training/
    "models": "config",
    "reader": "config",
    "streamed": "config reader",
    "regularize": "",
    "recipes": "config",
    "augment": "",
    "dataset": "augment streamed",
    "sources": "config plane",
    "data": "config dataset noise sources streamed",
    "checkpoint": "config files",
    "schedule": "config",
    "background": "",
    "parallel": "config",
    "recorder": "config dataset files record",
    "folder": "config files parallel record",
    "step": "config dataset models parallel regularize",
    "state": "checkpoint config files step",
    "train": (
        "background checkpoint config data dataset files folder models parallel record "
        "recorder schedule state step"
    ),
    "distill": (
        "augment checkpoint config data dataset folder fusion models parallel record "
        "recorder step train"
    ),
    "views": "config data distill folder record recorder train",
    "features": "config data dataset distill folder record recorder theory train",
    # fmnlib/study/
    "pool": "",
    "ablation": "config fusion noise record scores shares stats",
    "plots": "stats",
    "plots_ablation": "plots stats",
    "plots_theory": "plots",
    "publish": "record stats",
    "runs": "config distill features fusion pool record sources train views",
    "compare": "config fusion record runs search stats",
    "protocols": "compare config fusion record runs",
    "students": "compare config distill fusion record runs search",
    "grid": "compare config files protocols record runs search students",
    "book": "config files plots publish record runs stats",
    "report": "diagnosis fusion plots record scores",
    # fmnlib/outside/
    "tracker": "checkpoint config files record",
    "watch": "config tracker",
    "lightning": "record tracker watch",
    "huggingface": "record tracker watch",
    "pictures": "config sources",
    "checkpoints": "config files models pictures record",
    "shipping": "checkpoints config fusion models pictures",
    "external": "checkpoints config files fusion gains pictures record shipping train",
}
NO_TORCH = (
    "config files record noise scores theory overlap plane shares fusion search selection stats "
    "ablation plots publish intervals gains diagnosis report tracker external commands"
).split()


FILES = {path.stem: path for path in (ROOT / "fmnlib").rglob("[a-z]*.py")}
LAYERS = ["fmnlib", "training", "study", "outside"]  # each may import from those before it


def imports(module):
    """The modules of fmnlib that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fmnlib"):
            last = node.module.rpartition(".")[2]
            names |= {alias.name for alias in node.names} if last in LAYERS else {last}
        elif isinstance(node, ast.Import):
            names |= {a.name.rpartition(".")[2] for a in node.names if a.name.startswith("fmnlib")}
    return names


def test_every_module_has_its_row():
    assert set(OURS) == set(FILES)
    assert len(FILES) == len(list((ROOT / "fmnlib").rglob("[a-z]*.py")))  # names are unique


@pytest.mark.parametrize("module", sorted(set(OURS) - {"commands"}))
def test_layers_import_downwards(module):
    layer = LAYERS.index(FILES[module].parent.name)
    assert all(LAYERS.index(FILES[name].parent.name) <= layer for name in imports(module))


@pytest.mark.parametrize("module", OURS)
def test_modules_import_what_their_row_lists(module):
    assert imports(module) <= set(OURS[module].split())


def dotted(module):
    return ".".join(FILES[module].relative_to(ROOT).with_suffix("").parts)


def test_arrays_need_no_torch_and_the_package_no_matplotlib():
    script = "import sys\nimport fmnlib\nassert 'matplotlib' not in sys.modules\n"
    script += "".join(f"import {dotted(module)}\n" for module in NO_TORCH)
    script += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_modules_stay_short():
    for path in (ROOT / "fmnlib").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path.name


# ---------------------------------------------------------------- one address


def test_the_address_of_the_repository_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = project["urls"]["Repository"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["repository"]["url"] == address
    owner, name = address.split("/")[-2:]
    assert config["html"]["baseurl"] == f"https://{owner}.github.io/{name}/"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == address
    for path in NOTEBOOKS:
        assert f'"git+{address}@main"' in setup_cell(path), path.name
    for path in [*ROOT.glob("*.*"), *(ROOT / "book").rglob("*.*")]:
        if path.suffix in {".md", ".yml", ".toml", ".cff", ".bib", ".py"}:
            for found in re.findall(rf"https://github.com/[^/]+/{name}", path.read_text()):
                assert found == address, path.name


def setup_cell(path):
    cells = json.loads(path.read_text())["cells"]
    [cell] = [c for c in cells if "colab-setup" in c["metadata"].get("tags", [])]
    return "".join(cell["source"])


# ---------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_whole_and_ran_in_order(path):
    text = path.read_text()
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert "papermill" not in notebook["metadata"]
    assert not re.search(r'"/(root|home|tmp|content|Users)/', text)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["accelerator"] == "GPU"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_readable(path):
    cells = json.loads(path.read_text())["cells"]
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1
    assert "injected-parameters" not in tags
    assert tags.count("nbval-check-output") >= 2
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert len(source.splitlines()) <= 20, cell["id"]
            assert not re.search(r"^(def|class) ", source, re.MULTILINE), cell["id"]
            if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
                about = cell["metadata"]["mystnb"]
                assert len(about["image"]["alt"]) > 60, cell["id"]
                assert about["figure"]["caption"], cell["id"]
        else:
            assert not re.search(r"\{(cite|numref|ref|glue|result)\b", source), cell["id"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_sees_every_parameter(path):
    cells = json.loads(path.read_text())["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = [target for node in ast.parse("".join(cell["source"])).body for target in node.targets]
    assert all(isinstance(name, ast.Name) for name in names)
    assert {"profile", "changes", "fresh"} <= {name.id for name in names}


def test_every_notebook_is_in_the_book():
    toc = (ROOT / "_toc.yml").read_text()
    assert all(f"notebooks/{path.stem}" in toc for path in NOTEBOOKS)


# ---------------------------------------------------------------- numbers


def test_the_published_numbers_are_those_of_the_notebooks():
    published = [p for path in NOTEBOOKS for p in collect(json.loads(path.read_text()))]
    assert {p["item"]: p["summary"] for p in published} == SUMMARY


def test_the_readme_shows_our_numbers():
    text = (ROOT / "README.md").read_text()
    assert headline(SUMMARY) in text
    assert readme_with(SUMMARY, text) == text
    for method in ("single", "kf", "distilled_kf"):
        assert METHODS[method].name in headline(SUMMARY)
    emptied = text.replace(headline(SUMMARY) + "\n", "")
    assert emptied != text
    assert readme_with(SUMMARY, emptied) == text
    with pytest.raises(InputError, match="README.md lacks its marks"):
        readme_with(SUMMARY, text.replace("<!-- end -->", ""))


def test_committed_records_are_small():
    total = sum(path.stat().st_size for path in (ROOT / "results" / "reference").glob("*.npz"))
    assert 0 < total < 16_000_000
