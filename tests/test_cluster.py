"""A grid on a real Ray cluster of two nodes leaves the bits of plain runs, whatever is killed."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fmnlib import InputError, RunConfig, RunRecord, runs
from fmnlib.checkpoint import load_tensors
from fmnlib.config import Paused
from fmnlib.paper import grid

pytestmark = [
    pytest.mark.cluster,
    # Ray leaves files and sockets to the end of the process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
SMALL = {"epochs": 12, "train_samples": 1000, "eval_samples": 200}


@pytest.fixture(scope="module")
def address():
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=resources)
    cluster.add_node(**resources)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def tiny(monkeypatch):
    """A grid of one cell of digits: a run, its students and averages, two independent networks."""
    noisy = {"noise": "symmetric", "noise_rate": 0.4}
    monkeypatch.setitem(grid.GRIDS, "tiny", grid.Grid("quick", [noisy | SMALL]))
    return grid.cells("tiny", seeds=[0])


def kill_a_worker_in_mid_run(root, killed):
    """Wait for a run to have saved an epoch; end the process that holds it, as a machine would."""
    while not killed:
        for state in root.glob("*/state_1.safetensors"):
            lock = state.with_name(".lock").stat().st_ino
            for line in Path("/proc/locks").read_text().splitlines():
                pid, inode = line.split()[-4], line.split()[-3].split(":")[-1]
                if int(inode) == lock and "->" not in line:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append((state.parent.name, int(pid)))
                    return
        time.sleep(0.01)


def contents(root):
    for folder in sorted(root.iterdir()):
        record = RunRecord.load(folder)
        yield folder.name, record
        for file in sorted((folder / "checkpoints").iterdir()):
            yield file.name, load_tensors(file)


def test_a_killed_worker_changes_no_bit(address, tiny, tmp_path, monkeypatch):
    root, killed = tmp_path / "ray", []
    monkeypatch.setenv("FMN_RUNS", str(root))
    killer = threading.Thread(target=kill_a_worker_in_mid_run, args=(root, killed), daemon=True)
    killer.start()
    grid.work(tiny, make=runs.make_on_ray, device="cpu", address=address)
    assert killed, "no process was killed in mid-run"
    assert {row["state"] for row in grid.status(tiny)} == {"done"}
    monkeypatch.setenv("FMN_RUNS", str(tmp_path / "plain"))
    grid.work(tiny, device="cpu", workers=1)
    pairs = zip(contents(root), contents(tmp_path / "plain"), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name
        if isinstance(one, RunRecord):
            for field in ("predicted", "probs", "loss_histogram", "kept", "labels"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        else:
            assert one.keys() == other.keys()
            assert all((one[key] == other[key]).all() for key in one)


def test_what_ray_cannot_do_is_one_line(address, tiny, tmp_path, monkeypatch):
    on_ray = {"make": runs.make_on_ray, "device": "cpu", "address": address}
    with pytest.raises(
        InputError, match=r"gpus_per_run is 0\.5 and the cluster has no GPU; give 0"
    ):
        grid.work(tiny, **on_ray, gpus_per_run=0.5)
    with pytest.raises(Paused, match="the same command resumes it"):
        grid.work(tiny, **on_ray, deadline=time.monotonic() - 1)
    config = RunConfig(dataset=f"folder:{tmp_path}/nowhere")
    with pytest.raises(InputError, match=r"nowhere.*must hold") as told:
        runs.make_on_ray(lambda: [runs.Job(config)], "cpu", address=address)
    assert "\n" not in str(told.value)
    assert not [path for path in runs.root().iterdir() if path.suffix == ".part"]
