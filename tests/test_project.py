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

from book.build import headline, readme_with
from fmnlib import InputError
from fmnlib.paper.publish import collect
from fmnlib.plots import METHODS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SUMMARY = json.loads((ROOT / "results" / "summary.json").read_text())

NO_TORCH = (
    "config files record noise scores plane fusion stats diagnosis report tracker plots __main__ "
    "paper.theory paper.ablation paper.plots"
).split()


def test_layers_import_downwards():
    """The layers stand in pyproject.toml; import-linter holds them."""
    linter = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as m; m(['--no-cache'])",
    ]
    done = subprocess.run(linter, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 kept, 0 broken" in done.stdout


def test_the_front_door_opens_at_once():
    """Importing the package loads nothing heavy; its names load what they need."""
    script = (
        "import sys, fmnlib as fmn\n"
        "heavy = {'numpy', 'torch', 'pandas', 'matplotlib', 'scipy'}\n"
        "assert not heavy & set(sys.modules)\n"
        "fmn.RunRecord, fmn.forget_fraction, fmn.knowledge_fusion, fmn.Tracker\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert all(getattr(fmn, name) is not None for name in fmn.__all__)\n"
        "assert callable(fmn.train) and callable(fmn.distill)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_arrays_need_no_torch():
    script = "import sys\n" + "".join(f"import fmnlib.{module}\n" for module in NO_TORCH)
    script += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_readme_shows_every_file():
    """Its tree has a line for each module, and each of these a module."""
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("fmnlib/\n") :].partition("notebooks/")[0]
    shown = set(re.findall(r"^ *([a-z_]+)(?:\.py|/)? ", tree, re.MULTILINE))
    modules = {path.stem for path in (ROOT / "fmnlib").rglob("*.py")} - {"__init__", "__main__"}
    assert modules <= shown | {"lightning", "huggingface"}
    assert shown - modules <= {"__init__", "__main__", "integrations", "paper"}


def test_the_library_stays_small():
    files = [path.read_text().splitlines() for path in (ROOT / "fmnlib").rglob("*.py")]
    assert len(files) <= 42
    assert max(map(len, files)) <= 600
    assert sum(map(len, files)) <= 9150


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
        assert f"!git clone -q --depth 1 {address}\n" in setup_cell(path), path.name
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
    assert path.stat().st_size < 1_200_000


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
    others = {
        "12_cifar100": {"results"},
        "14_text": {"samples", "epochs"},
    }  # no run of the library
    wanted = {"fresh"} | others.get(path.stem, {"profile", "changes"})
    assert wanted <= {name.id for name in names}


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
    assert 0 < total < 42_000_000
