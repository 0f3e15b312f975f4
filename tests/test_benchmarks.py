import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import usual
from benchmarks.machine import Machine, work
from benchmarks.measure import Row, Spread, table
from fmnlib import RunConfig
from fmnlib.data import load
from fmnlib.training import build_model

ROOT = Path(__file__).parent.parent


def test_the_usual_script_learns_the_digits_and_saves_what_it_says(tmp_path):
    config = RunConfig(epochs=6, augment="crop")
    data = load(config)
    seconds = usual.epochs(config, data, 6, workers=0, save=tmp_path)
    assert len(seconds) == 6
    first, last = (np.load(tmp_path / f"{n}.npy") for n in (0, 5))
    labels = data.eval_labels.numpy()
    assert (last.argmax(1) == labels).mean() > 0.95
    assert -np.log(last[range(797), labels]).mean() < -np.log(first[range(797), labels]).mean()
    saved = torch.load(tmp_path / "5.pt", weights_only=True)
    model = build_model(config, data)
    model.load_state_dict(saved["model"])
    probs = model.eval()(data.normalize(data.eval_images)).softmax(1)
    np.testing.assert_allclose(probs.detach().numpy(), last, atol=1e-4)


def test_the_usual_student_follows_its_teacher(tmp_path):
    """A teacher that is always sure of class 3 makes a student that says 3."""
    config = dataclasses.replace(RunConfig(epochs=3), soft_share=1.0, temperature=1.0)
    data = load(config)

    class Three(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 10).index_fill_(1, torch.tensor([3]), 20.0)

    usual.epochs(config, data, 2, 0, teacher=[(Three(), 1.0)], save=tmp_path)
    assert (np.load(tmp_path / "1.npy").argmax(1) == 3).all()


def test_work_of_a_convolution_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(4 * 64, 10, bias=False))
    counted = work(net, (3, 8, 8), 2, torch.bfloat16)
    conv, linear = 2 * 64 * 4 * 27, 2 * 256 * 10
    assert counted.forward == conv + linear
    assert counted.training == 2 * conv + 3 * linear  # the images need no gradient
    weights = 4 * 27 + 256 * 10
    assert counted.moved == 2 * (256 + 10) * 2 + 7 * weights * 4 / 2


def test_the_slower_of_two_rates_bounds():
    machine = Machine(torch.device("cpu"), torch.float32, operations=100.0, bytes=10.0)
    assert machine.seconds(50, 1) == (0.5, "operations")
    assert machine.seconds(50, 20) == (2.0, "bytes")


def test_a_table_says_how_many_times_better():
    spread = Spread.of([20.0, 10.0, 30.0])
    rate = Row("training", "net", "images/s", spread, Spread.of([5.0]), 1234.5, "bytes", "CPU")
    time = dataclasses.replace(rate, unit="s")
    share = dataclasses.replace(rate, unit="%", usual=None, floor=None)
    lines = table([rate, time, share]).splitlines()
    assert lines[2].startswith("| training | net | images/s | 20 (10 to 30) | 5 | 4.0x | 1,234 |")
    assert [row.gain for row in (rate, time, share)] == ["4.0x", "0.2x", ""]
    assert len({line.count("|") for line in lines}) == 1


def test_one_command_prints_a_table_and_writes_the_numbers(tmp_path):
    sections = ["training", "recording", "search"]
    command = [sys.executable, "-m", "benchmarks", *sections, "--small", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    [written] = tmp_path.glob("cpu-*.json")
    numbers = json.loads(written.read_text())
    assert numbers["provenance"]["threads"] >= 1
    assert numbers["provenance"]["operations_per_s"] > 0
    assert str(Path.home()) not in written.read_text()
    assert {row["section"] for row in numbers["rows"]} == set(sections)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(numbers["rows"])
    assert all(np.isfinite(row["ours"]["median"]) for row in numbers["rows"])


def test_an_unknown_section_is_an_error():
    command = [sys.executable, "-m", "benchmarks", "trainin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no section trainin; choose of training, recording" in done.stderr
