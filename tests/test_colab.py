"""The notebooks where Colab's packages are, and nothing else of this project's environment.

The clean environment is a new virtual environment with links to those packages (and to what they
require), so nothing large is installed twice. The set-up cell installs this checkout in place of
the public address.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import nbformat
import papermill
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = (
    "babel ipykernel ipywidgets matplotlib numpy pandas scikit-learn scipy torch torchvision tqdm"
)

pytestmark = pytest.mark.colab


def closure(names):
    """Distributions and all that they require here."""
    found, todo = {}, list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        for text in found[name].requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                todo.append(wanted.name)
    return found


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """The interpreter of an environment like Colab's, which a Jupyter kernel named colab runs."""
    home = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", home / "env"], check=True)
    [packages] = (home / "env" / "lib").glob("python*/site-packages")
    for distribution in closure(COLAB.split()).values():
        for top in {file.parts[0] for file in distribution.files or []} - {".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "as_in_colab.py").write_text("import google.colab\n")
    python = home / "env" / "bin" / "python"
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = {"IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    kernel = home / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    about = {"argv": argv, "env": environment, "display_name": "Colab", "language": "python"}
    kernel.write_text(json.dumps(about))
    return python


def of_this_checkout(path, target):
    """A copy of a notebook, and of this checkout where its set-up cell would clone it to."""
    notebook = nbformat.read(path, as_version=4)
    [cell] = [c for c in notebook.cells if "colab-setup" in c.metadata.get("tags", [])]
    clone = re.search(r"!git clone -q --depth 1 https://github.com/\S+/forget-me-not", cell.source)
    cell.source = cell.source.replace(clone.group(), "pass")
    checkout = target.parent / "forget-me-not"
    for name in ("fmnlib", "results"):
        shutil.copytree(ROOT / name, checkout / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    nbformat.write(notebook, target)
    return cell.source


def ask(python, script):
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_of_this_project_is_there_beforehand(colab):
    missing = "fmnlib jaxtyping cyclopts seaborn safetensors papermill beartype lightning".split()
    script = "from importlib.util import find_spec\n"
    assert ask(colab, f"{script}print([n for n in {missing} if find_spec(n)])") == "[]"
    assert ask(colab, f"{script}print(bool(find_spec('torch')))") == "True"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("00_quickstart", {"changes": {"epochs": 12}}),
        ("11_your_own_model", {"changes": {"epochs": 12}}),
        ("12_cifar100", {}),  # reads what was measured
    ],
)
def test_a_notebook_sets_itself_up_and_finishes(colab, name, parameters, tmp_path, monkeypatch):
    about = "import torch as t, torchvision as v, numpy as n\n"
    about += "print([(m.__version__, m.__file__) for m in (t, v, n)])"
    before = ask(colab, about)
    monkeypatch.setenv("JUPYTER_PATH", str(colab.parents[2] / "jupyter"))
    setup = of_this_checkout(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "in.ipynb")
    assert "%pip install" in setup
    done = papermill.execute_notebook(
        tmp_path / "in.ipynb",
        tmp_path / "out.ipynb",
        parameters,
        kernel_name="colab",
        cwd=tmp_path,
        progress_bar=False,
    )
    outputs = [o for cell in done.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert ask(colab, about) == before
    where = ask(colab, "import fmnlib; print(fmnlib.__file__)")
    assert Path(where).is_relative_to(colab.parents[1])  # installed, not this checkout


def test_every_notebook_finds_all_that_it_imports(colab):
    lines = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and "import" in source and "%" not in source:
                found = re.findall(
                    r"^(?:from|import) [^(\n]+(?:\([^)]*\))?$", source, re.MULTILINE
                )
                lines += found
    assert len(lines) > 50
    ask(colab, "\n".join(lines))
