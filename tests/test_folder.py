"""A run's folder is one run's, and one process's at a time."""

import threading
import time

import numpy as np
import pytest
import torch
from filelock import FileLock

from fmnlib import InputError, RunConfig, RunRecord
from fmnlib.recorder import load_or_create

CPU = torch.device("cpu")
RECORD = RunRecord.from_arrays(np.full((1, 2, 2), 0.5), [0, 1])


def test_a_folder_is_one_runs(tmp_path):
    load_or_create(RunConfig(), tmp_path, CPU, lambda data: RECORD)
    with pytest.raises(InputError, match="is the folder of another run; choose another folder"):
        load_or_create(RunConfig(seed=1), tmp_path, CPU, lambda data: RECORD)


def test_a_record_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        record = load_or_create(RunConfig(), tmp_path, CPU, lambda data: made.append(1) or RECORD)
    assert made == [1]
    np.testing.assert_array_equal(record.predicted, RECORD.predicted)


def test_the_second_waits_and_says_so(tmp_path, capsys):
    config, made = RunConfig(), []
    with FileLock(tmp_path / ".lock", thread_local=False):
        other = threading.Thread(
            target=load_or_create,
            args=(config, tmp_path, CPU, lambda data: made.append(1) or RECORD),
        )
        other.start()
        while not (told := capsys.readouterr().err):
            time.sleep(0.01)
        assert not made
    other.join()
    assert made == [1]
    assert told == f"waiting for another process that trains {config.id}\n"
