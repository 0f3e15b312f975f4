"""What users have in another form, or ask for without effect: done right, or told in one line."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fmnlib import InputError, RunConfig, Tracker, images
from fmnlib.data import load
from fmnlib.external import maker, open_labelled
from fmnlib.images import Preprocessing, open_folder
from fmnlib.weights import load_weights

GREY = Preprocessing(size=8, resize=8, mean=(0.5,), std=(0.5,))
LOOK = "--size 8 --resize 8 --mean 0.5 --std 0.5".split()
NET = """
from torch import nn
def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2){})
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two classes of images, dark and light, and a tracked loop of four epochs."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 10), ("test", 10)):
        for name, level in (("dark", 60), ("light", 180)):
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(level - 50, level + 50, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{n}.png")
    (tmp_path / "net.py").write_text(NET.format(""))
    images = open_folder(tmp_path / "val", GREY)
    tracker = Tracker(tmp_path / "tracked", images.labels)
    track(tracker, images, 4)
    return tmp_path


def track(tracker, images, epochs):
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            net[1].weight[:] = torch.tensor([[-1.0], [1.0]]) * 0.1 + 0.1 * torch.randn(2, 64)
            tracker.note(net.eval()(GREY.normalize(images.load())), net)


def test_a_function_may_return_one_network_for_all_calls(tmp_path):
    (tmp_path / "one.py").write_text(
        "from torch import nn\nnet = nn.Linear(1, 2)\ndef build(): return net\n"
    )
    make = maker(f"{tmp_path}/one.py:build", classes=2, preprocessing=GREY)
    assert make() is not make()


def test_every_network_of_torchvision_is_built_or_refused_in_one_line(small, fmn, runs_root):
    words = ["train", "--dataset", f"folder:{small}", "--epochs", 1, "--batch-size", 12]
    words += ["--image-size", 32, "--model"]
    assert fmn(*words, "torchvision:regnet_y_400mf")[0] == 0
    for name in ("alexnet", "maxvit_t"):
        code, out, err = fmn(*words, f"torchvision:{name}")
        assert (code, out) == (2, "")
        assert f"{name} takes no images of 32 x 32 pixels" in err.splitlines()[-1]
    assert len(list(runs_root.iterdir())) == 1


def test_a_fusion_of_fewer_epochs_is_gone_when_the_loop_goes_on(small, fmn):
    assert fmn("fuse", "tracked")[0] == 0
    images = open_folder(small / "val", GREY)
    track(Tracker("tracked", images.labels, start=4), images, 1)
    assert not (small / "tracked" / "fusion.json").exists()
    words = ["--model", "net.py:build", "--train", "train", *LOOK]
    assert fmn("labels", "tracked", *words)[0] == 0


def test_changed_evaluation_labels_are_not_taken_for_the_old_ones(small, fmn):
    words = f"train --dataset folder:{small} --epochs 1 --model mlp --image-size 8 --batch-size 12"
    assert fmn(*words.split())[0] == 0
    (small / "test/dark/0.png").rename(small / "test/light/dark.png")
    assert "was evaluated on other labels than its settings give now" in fmn(*words.split())[2]


@pytest.mark.parametrize("command", ["fuse", "labels"])
def test_a_network_that_ends_in_a_softmax_is_told_before_any_work(small, fmn, command):
    (small / "soft.py").write_text(NET.format(", nn.Softmax(1)"))
    code, _, err = fmn(command, "tracked", "--model", "soft.py:build", "--train", "train", *LOOK)
    assert code == 2
    assert "returns probabilities, not logits; leave out its softmax" in err


def test_of_two_networks_in_a_file_none_is_taken_at_random():
    net = nn.Linear(1, 1)
    both = {f"{p}{k}": v for p in ("ema.", "net.") for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match=r"holds ema\. and net\., any of which fits"):
        load_weights(net, both)


NAMED = """
import torch
from torch import nn
class Net(nn.Sequential):
    def forward(self, x): return super().forward(x)
def build(): return Net(nn.Linear(64, 2), nn.BatchNorm1d(2))
def batches(n): return [{"x": torch.randn(n, 64), "labels": torch.arange(n) % 2}] * 2
rows = batches(10)
def val(): return rows
def train(): return batches(8)
def single(): return [(torch.randn(64), 1)]
"""


def test_batches_with_names_are_told_early_or_teach_a_student(tmp_path, monkeypatch, fmn):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.py").write_text(NAMED)
    tracker, net = (
        Tracker("tracked", [0, 1] * 10),
        nn.Sequential(nn.Linear(64, 2), nn.BatchNorm1d(2)),
    )
    for _ in range(3):
        tracker.note(torch.eye(2).repeat(10, 1), net.eval())
    words = (
        "fuse tracked --model named.py:build --data named.py:val --train named.py:train".split()
    )
    code, _, err = fmn(*words)
    assert (code, "give batches as pairs" in err) == (2, True)
    assert fmn(*words, "--network", "distilled", "--epochs", 1)[0] == 0
    with pytest.raises(InputError, match=r"labels of a batch are of shape \(\); give"):
        open_labelled(tmp_path / "named.py:single", GREY)


def test_a_class_without_training_images_is_told(small, fmn):
    (small / "train" / "light").rename(small / "elsewhere")
    words = ["--model", "net.py:build", "--train", "train", "--network", "distilled", *LOOK]
    code, _, err = fmn("fuse", "tracked", *words)
    assert (code, "1 class folders for 2 tracked classes" in err) == (2, True)


def test_half_of_the_classes_of_a_folder_keep_their_names(small):
    for place in (small / part / name for part in ("train", "test") for name in ("x", "y")):
        place.mkdir()
        Image.new("L", (8, 8)).save(place / "0.png")
    data = load(RunConfig(dataset=f"folder:{small}", classes="second_half", image_size=8))
    assert (data.files.classes, data.files.labels.tolist()) == (["x", "y"], [0, 1])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_no_utf_8_is_written(small, fmn):
    os.rename("train/dark/0.png", b"train/light/caf\xe9.png")
    words = ["--model", "net.py:build", "--train", "train", *LOOK]
    assert fmn("labels", "tracked", *words, "--html", "wrong.html")[0] == 0
    assert b"light/caf\xe9.png" in (small / "labels.csv").read_bytes()


def test_a_home_folder_is_found(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small))
    assert len(open_labelled(Path("~/val"), GREY).labels) == 20


def test_json_alone_is_on_the_standard_output(fmn):
    words = "train --epochs 3 --train-samples 50 --eval-samples 20 --max-minutes 0 --json".split()
    code, out, err = fmn(*words)
    assert (code, out) == (0, "")
    assert "paused after 1 of 3 epochs" in err


def test_what_would_have_no_effect_is_refused(small, fmn):
    words = ["--model", "net.py:build", "--train", "train", *LOOK]
    assert "--epochs 50 is for a student" in fmn("fuse", "tracked", *words, "--epochs", 50)[2]
    assert (
        "--device has no use" in fmn("labels", "tracked", "--train", "tracked", "--device", "x")[2]
    )
    assert (
        "csv and html are both" in fmn("labels", "tracked", *words, "--csv", "a", "--html", "a")[2]
    )


def test_what_a_function_prints_is_no_json(small, fmn):
    (small / "loud.py").write_text(
        "print('read')\n" + NET.format("").replace("():", "():\n    print('made')")
    )
    words = ["--model", "loud.py:build", "--train", "train", *LOOK, "--json"]
    json.loads(fmn("labels", "tracked", *words)[1])


def test_a_student_lies_beside_its_run_from_inside_the_run_too(fmn, runs_root, monkeypatch):
    fmn(*"train --model mlp --epochs 2 --train-samples 50 --eval-samples 20".split())
    [run] = runs_root.iterdir()
    monkeypatch.chdir(run)
    assert (
        "--teacher-views 3 is for augmented views" in fmn("distill", ".", "--teacher-views", 3)[2]
    )
    assert fmn("distill", ".")[0] == 0
    assert len(list(runs_root.iterdir())) == 2


def test_deep_pixels_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "a" / "0.png")
    with pytest.raises(InputError, match="its mode is I;16; save it with 8 bits"):
        open_folder(tmp_path, GREY).load()


def test_images_come_in_batches_of_one_size_each_with_its_label(tmp_path, monkeypatch):
    for number in range(101):  # the statistics of all batches count alike in BatchNorm's
        place = tmp_path / "dark" if number < 40 else tmp_path / "light"
        place.mkdir(exist_ok=True)
        Image.new("L", (8, 8), number).save(place / f"{number:03}.png")
    for limit in (images.IN_MEMORY, 0):  # held, and read from the files
        monkeypatch.setattr(images, "IN_MEMORY", limit)
        batches = [*open_labelled(tmp_path, GREY).read()]
        assert [len(labels) for _, labels in batches] == [51, 50]
        pixels = torch.cat([batch for batch, _ in batches])[:, 0, 0, 0]
        torch.testing.assert_close(pixels, (torch.arange(101) / 255 - 0.5) / 0.5)
        assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 40 + [1] * 61
