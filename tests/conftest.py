"""What all tests share: real data sets where FMN_DATA has them, one thread a test process."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    told = "cuda runs the tests of the GPU path on a GPU, and not on a stand-in"
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help=told)


def pytest_configure(config):
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device is cuda, and there is no GPU; leave it out")


def pytest_collection_modifyitems(items):
    """The files that take longest first: no worker is left with one when the others are done."""
    longest = ("test_notebooks.py", "test_guide.py")
    items.sort(key=lambda item: item.path.name not in longest)  # else as they were


@pytest.fixture(autouse=True)
def runs_root(tmp_path, monkeypatch):
    """Every test has a folder of runs of its own."""
    monkeypatch.setenv("FMN_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def real_data():
    """The folder of real data sets; tests that need it are skipped without it."""
    root = Path(os.environ.get("FMN_DATA", ""))
    if "FMN_DATA" not in os.environ or not (root / "cifar100").exists():
        pytest.skip("FMN_DATA names no folder with cifar100/ and fashionmnist/")
    return root


@pytest.fixture
def dying(monkeypatch):
    """A block in which training is interrupted while it writes its third checkpoint."""
    from fmnlib import recorder

    write = recorder.write_whole

    def die(path, content):
        if path.name == "epoch_0002.safetensors":
            raise KeyboardInterrupt
        write(path, content)

    @contextlib.contextmanager
    def block():
        with monkeypatch.context() as patch:
            patch.setattr(recorder, "write_whole", die)
            with pytest.raises(KeyboardInterrupt):
                yield

    return block


@pytest.fixture
def fmn(monkeypatch, capsys):
    """Run the command in this process; give back exit code, standard output and error."""
    from fmnlib.__main__ import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fmn", *map(str, words)])
        monkeypatch.setenv("TQDM_DISABLE", "1")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run
