"""The files of a run: what is written is read back, and whatever is not as written is refused."""

import copy
import os
import select
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fmnlib import InputError, RunConfig, RunRecord, recorder
from fmnlib.checkpoint import (
    check_labels,
    checkpoint_path,
    clear_states,
    folder_lock,
    load_tensors,
    newest_state,
    pack_state,
    restore,
    rounded,
    rounded_by_autocast,
    run_lock,
    save_tensors,
    snapshot,
)
from fmnlib.files import write_whole
from fmnlib.parallel import World
from fmnlib.recorder import load_or_create
from fmnlib.step import TrainingState, make_optimizer, make_scaler

CONFIG = RunConfig(momentum=0.9, lr=0.1)


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR)  # so that opening it does not wait for a writer
    try:
        with pytest.raises(InputError, match="pipe cannot be read .it is not a file.; move it"):
            load_tensors(tmp_path / "pipe")
    finally:
        os.close(end)


def state_of(folder, epoch):
    write_whole(*pack_state(folder, {"w": torch.full((2,), float(epoch))}, epoch))


def parts(averaged=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = copy.deepcopy(model) if averaged else model
    scaler = make_scaler(CONFIG, torch.device("cpu"))
    return TrainingState(model, make_optimizer(CONFIG, model), ema, scaler, None)


def learn(of):
    of.optimizer.zero_grad()
    of.model(torch.randn(5, 3)).square().sum().backward()
    of.optimizer.step()


def test_checkpoints_of_many_epochs_sort_by_name(tmp_path):
    assert checkpoint_path(tmp_path, 7) == tmp_path / "checkpoints" / "epoch_0007.safetensors"


def test_what_autocast_rounds_is_named_and_nothing_else_is_rounded():
    attention = nn.MultiheadAttention(4, 2)
    net = nn.ModuleDict({"c": nn.Conv2d(1, 1, 1), "n": nn.BatchNorm2d(1), "a": attention})
    names = rounded_by_autocast(net)
    assert names == {"c.weight", "a.in_proj_weight", "a.out_proj.weight"}
    assert rounded_by_autocast(nn.Linear(1, 1)) == {"weight"}
    half = rounded(net.state_dict(), names, torch.bfloat16)
    assert {name for name, value in half.items() if value.dtype == torch.bfloat16} == names
    assert half.keys() == net.state_dict().keys()


def test_tensors_are_read_back_and_a_changed_one_is_not(tmp_path):
    stored = {"b": torch.arange(3), "a": torch.randn(2, 3).T}
    save_tensors(tmp_path / "t", stored)
    again = load_tensors(tmp_path / "t")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    content = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        InputError, match=r"cannot be read \(its checksum is wrong\); move it away"
    ):
        load_tensors(tmp_path / "t")
    (tmp_path / "t").write_bytes(content.replace(b'"a"', b'"c"'))
    with pytest.raises(InputError, match="its checksum is wrong"):
        load_tensors(tmp_path / "t")  # names count, too


def test_the_newest_of_two_states_is_taken_and_they_take_turns(tmp_path):
    assert newest_state(tmp_path) is None
    for epoch in range(5):
        state_of(tmp_path, epoch)
        found, tensors = newest_state(tmp_path)
        assert found == epoch
        assert tensors.keys() == {"w"}
        assert tensors["w"].tolist() == [epoch] * 2
    assert len(list(tmp_path.iterdir())) == 2
    clear_states(tmp_path)
    assert not list(tmp_path.iterdir())
    clear_states(tmp_path)


def test_a_state_that_names_no_epoch_is_set_aside(tmp_path):
    state_of(tmp_path, 0)
    save_tensors(tmp_path / "state_1.safetensors", {"w": torch.ones(1)})
    with pytest.warns(
        UserWarning, match=r"state_1.* names no epoch; set aside as state_1.damaged"
    ):
        found = newest_state(tmp_path)
    assert found[0] == 0
    assert (tmp_path / "state_1.damaged").exists()


@pytest.mark.parametrize("averaged", [True, False])
def test_training_goes_on_from_what_was_restored_as_if_nothing_had_been(averaged):
    one, other = parts(averaged), parts(averaged)
    for _ in range(3):
        learn(one)
    if averaged:
        with torch.no_grad():
            one.ema[0].weight.mul_(0.5)
    one.scaler.update(8.0)
    before = snapshot(one)
    restore(other, before)
    for of in (one, other):
        torch.manual_seed(1)
        learn(of)
    after, same = snapshot(one), snapshot(other)
    assert after.keys() == same.keys()
    assert all(torch.equal(after[name], same[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)  # a copy is one


def test_a_folder_is_one_runs(tmp_path):
    tmp_path = tmp_path / "made" / "with its parents"
    with run_lock(CONFIG, tmp_path):
        pass
    assert RunConfig.load(tmp_path / "config.json") == CONFIG
    with pytest.raises(InputError, match="is the folder of another run; choose another folder"):
        with run_lock(RunConfig(lr=0.2), tmp_path):
            pytest.fail("another run was let in")
    with run_lock(CONFIG, tmp_path):  # it was given back
        pass


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    with run_lock(CONFIG, tmp_path):
        pass
    (tmp_path / "checkpoints").mkdir()
    for left in (tmp_path / ".a.part", tmp_path / "checkpoints" / ".b.part"):
        left.touch()
    (tmp_path / "mine.part").touch()
    with run_lock(CONFIG, tmp_path):
        assert not list(tmp_path.rglob(".*.part"))
    assert (tmp_path / "mine.part").exists()


def test_a_second_process_waits_and_says_so(tmp_path):
    script = "import sys; from pathlib import Path; from fmnlib import RunConfig\n"
    script += "from fmnlib.checkpoint import run_lock\n"
    script += "with run_lock(RunConfig(momentum=0.9, lr=0.1), Path(sys.argv[1])): "
    script += "print('in', flush=True)"
    with folder_lock(tmp_path).acquire(timeout=0), folder_lock(tmp_path).acquire(timeout=0):
        words = [sys.executable, "-c", script, tmp_path]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, **pipes)
        told = process.stderr.readline()
        assert told == f"waiting for another process that trains {CONFIG.id}\n"
        assert not select.select([process.stdout], [], [], 2)[0]  # it says nothing more
    assert process.communicate()[0] == "in\n"


def test_of_several_processes_the_first_alone_locks(tmp_path):
    class Passing(World):
        def barrier(self):
            passed.append(self.rank)

    passed = []
    with folder_lock(tmp_path).acquire(timeout=0), run_lock(CONFIG, tmp_path, Passing(1, 2)):
        assert passed == [1]
    assert not (tmp_path / "config.json").exists()
    with run_lock(CONFIG, tmp_path, Passing(0, 2)):
        assert passed == [1, 0]


def test_other_labels_than_at_the_beginning_are_refused(tmp_path):
    labels = np.array([0, 1, 2])
    check_labels(tmp_path, labels)
    check_labels(tmp_path, labels)
    with pytest.raises(InputError, match="was trained on other labels than its settings give now"):
        check_labels(tmp_path, labels[::-1].copy())


def test_a_record_is_made_once(tmp_path):
    made = []

    def make(data):
        made.append(len(data.labels))
        return RunRecord.from_arrays(np.full((1, 2, 2), 0.5), [0, 1])

    one, two = (load_or_create(CONFIG, tmp_path, torch.device("cpu"), make) for _ in range(2))
    assert made == [1000]
    assert one.labels.tolist() == two.labels.tolist() == [0, 1]


def test_the_commit_is_that_of_the_librarys_own_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        subprocess.run(("git", *me, *arguments), cwd=tmp_path, check=True, capture_output=True)

    installed = tmp_path / "lib" / "fmnlib"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    git("init")
    git("commit", "--allow-empty", "-m", "someone's project")
    monkeypatch.setattr(recorder, "__file__", str(installed / "recorder.py"))
    assert recorder._commit.__wrapped__() == ("", False)
    git("add", "lib")
    git("commit", "-m", "the library")
    commit, changed = recorder._commit.__wrapped__()
    assert len(commit) == 12
    assert not changed
