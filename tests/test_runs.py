import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fmnlib import InputError, RunConfig, fusion, runs
from fmnlib.data import load
from fmnlib.fusion import knowledge_fusion
from fmnlib.paper.compare import compare, independent_members
from fmnlib.training import train

SMALL = RunConfig(noise="symmetric", noise_rate=0.4, train_samples=200, epochs=4)


def test_runs_side_by_side_are_those_trained_alone(runs_root, tmp_path):
    configs = [dataclasses.replace(SMALL, seed=seed) for seed in (0, 1, 0)]
    records = runs.obtain(configs, device="cpu", progress=False)
    assert [record.config for record in records] == configs
    assert len(list(runs_root.glob("*/record.npz"))) == 2
    alone = train(configs[1], tmp_path / "alone", device="cpu", progress=False)
    np.testing.assert_array_equal(alone.probs, records[1].probs)


def test_nothing_trains_twice(runs_root):
    runs.obtain([SMALL], device="cpu", progress=False)
    [file] = runs_root.glob("*/record.npz")
    before = file.stat().st_mtime_ns
    runs.obtain([SMALL], device="cpu", progress=False)
    assert file.stat().st_mtime_ns == before


def test_a_bar_counts_the_networks_that_are_known_so_far(runs_root, capsys):
    first, second = (dataclasses.replace(SMALL, seed=seed) for seed in (0, 1))

    def left():  # the second is known once the first is there, as a student is
        if not runs.complete(first):
            return [runs.Job(first)]
        return [] if runs.complete(second) else [runs.Job(second)]

    runs.make_all(left, "cpu", workers=1)
    told = capsys.readouterr().err
    assert re.search(r"training: 100%\|\S*\| 1/1 ", told)
    assert re.search(r"training: 100%\|\S*\| 2/2 ", told)


def test_a_student_gets_its_teacher_trained_first(runs_root):
    weights = fusion.Fusion(np.array([0.5, 0.0, 0.0, 0.5]))
    jobs = [runs.student(SMALL, "kf", weights), runs.averaged(SMALL, "kf", weights)]
    student, averaged = runs.obtain(jobs, device="cpu", progress=False)
    assert runs.folder(SMALL).joinpath("record.npz").exists()
    assert student.epochs == 4
    assert averaged.epochs == 1
    assert {row["state"] for row in runs.listing()} == {"complete"}
    assert len(runs.listing()) == 3


def test_committed_records_are_read_unless_a_fresh_one_is_wanted(tmp_path, monkeypatch, runs_root):
    record = train(SMALL, tmp_path / "run", device="cpu", progress=False)
    monkeypatch.setattr(runs, "REFERENCE", tmp_path)
    record.save(tmp_path / f"{SMALL.id}.npz")
    [read] = runs.obtain([SMALL], device="cpu")
    np.testing.assert_array_equal(read.probs, record.probs)
    assert not runs_root.exists()
    runs.obtain([SMALL], device="cpu", fresh=True, progress=False)
    assert runs.folder(SMALL).exists()


def test_find_takes_the_beginning_of_a_name(runs_root):
    configs = [dataclasses.replace(SMALL, seed=seed) for seed in (0, 1)]
    runs.obtain(configs, device="cpu", progress=False)
    assert runs.find(configs[0].id[:-3]) == runs.folder(configs[0])
    assert runs.find(str(runs.folder(configs[1]))) == runs.folder(configs[1])
    with pytest.raises(InputError, match="2 runs in .* begins with 'digits'"):
        runs.find("digits")
    with pytest.raises(InputError, match="no run in .* begins with 'nothing'"):
        runs.find("nothing")


def test_independent_members_share_labels_and_no_network():
    crowd = independent_members(SMALL, 3) + independent_members(
        dataclasses.replace(SMALL, seed=1), 3
    )
    assert len({config.id for config in crowd}) == 6
    assert {config.noise_seed for config in crowd} == {0}


def test_compare_scores_each_method_once_on_the_test_half():
    results = compare([SMALL], item="label_noise", splits=(0, 1), members=2)
    kf = {r.split_seed: r for r in results if r.method == "kf"}
    [record] = runs.obtain([SMALL])
    for split in (0, 1):
        val, test = record.split(split)
        found = knowledge_fusion(val)
        assert kf[split].accuracy == fusion.accuracy(test, found)
        assert kf[split].networks == found.networks
    assert len(results) == 2 * len({r.method for r in results}) == 28
    cost = {r.method: (r.networks, r.train_seconds) for r in results}
    assert cost["independent"][0] == 2
    assert cost["independent"][1] > cost["single"][1]
    assert cost["distilled_kf"][0] == cost["averaged_kf"][0] == cost["single"][0] == 1


def test_the_nearest_neighbours_are_those_of_plain_loops():
    [knn] = [r for r in compare([SMALL], item="x", splits=[0], members=1) if r.method == "knn"]
    data, [record] = load(SMALL), runs.obtain([SMALL])
    test = record.split(0)[1]
    train, queries = (
        data.normalize(images).flatten(1).double().numpy()
        for images in (data.images, data.eval_images[test.index])
    )
    right = 0
    for query, label in zip(queries, test.labels, strict=True):
        nearest = ((train - query) ** 2).sum(axis=1).argsort(kind="stable")[:15]
        right += np.bincount(data.labels[nearest].numpy()).argmax() == label
    assert knn.accuracy == pytest.approx(right / len(test.labels), abs=1.5 / len(test.labels))


WORKER = """
import json, sys, time
from pathlib import Path
from fmnlib import RunConfig, runs
from fmnlib.checkpoint import folder_lock

configs = [RunConfig(train_samples=200, epochs=4, seed=seed) for seed in range(4)]
made, make = [], runs.make

def noted(job, *rest):
    if done := make(job, *rest):
        made.append(job.config.seed)
    return done

runs.make = noted
Path(sys.argv[1]).touch()
while len(list(Path(sys.argv[1]).parent.glob("ready*"))) < 2:
    time.sleep(0.01)
runs.obtain(configs, device="cpu", workers=1, progress=False)
print(json.dumps(made))
"""


def test_two_processes_share_a_list_of_runs(runs_root, tmp_path):
    """Each takes what the other has not; both end when everything is there."""
    command = [sys.executable, "-c", WORKER]
    both = [
        subprocess.Popen([*command, tmp_path / f"ready{n}"], stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    made = [json.loads(process.communicate()[0]) for process in both]
    assert len(list(runs_root.glob("*/record.npz"))) == 4
    assert all(made), "one process did everything"
    for part in made:
        assert len(part) < 4, "no run was left to the other process"


def test_a_run_that_another_process_holds_comes_last(runs_root):
    configs = [dataclasses.replace(SMALL, seed=seed) for seed in (0, 1)]
    first = runs.folder(configs[0])
    first.mkdir(parents=True)
    hold = "from fmnlib.checkpoint import folder_lock; from pathlib import Path; import sys\n"
    hold += f"with folder_lock(Path({str(first)!r})).acquire(): print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(runs.obtain, configs, device="cpu", workers=1, progress=False)
        while not runs.complete(configs[1]):
            time.sleep(0.05)
        assert not future.done()
        assert not runs.complete(configs[0])
        holder.communicate("\n")
        assert [record.config for record in future.result()] == configs


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_no_more_runs_at_a_time_than_cores_that_the_process_may_use():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # as a batch system does
    try:
        assert runs.local_devices("cpu") == ["cpu"]
    finally:
        os.sched_setaffinity(0, cores)


def test_every_gpu_of_the_machine_is_used_unless_one_is_named(monkeypatch):
    assert runs.local_devices("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr(runs, "pick_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    every = ["cuda:0", "cuda:1", "cuda:2"]
    assert runs.local_devices("auto") == runs.local_devices("cuda") == every
    assert runs.local_devices("auto", 5) == [*every, "cuda:0", "cuda:1"]
    assert runs.local_devices("cuda:1") == ["cuda:1"]
    assert runs.local_devices("cuda:1", 2) == ["cuda:1"] * 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert runs.local_devices("cuda") == ["cuda"]  # torchrun gives each process its own
