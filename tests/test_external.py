"""Checkpoints of a training from elsewhere, from files on disk to one network that is shipped."""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fmnlib import InputError, RunRecord, images
from fmnlib.__main__ import main
from fmnlib.external import maker, open_labelled, record_checkpoints
from fmnlib.fusion import knowledge_fusion
from fmnlib.images import Preprocessing, open_folder
from fmnlib.weights import find_checkpoints, load_weights, read_state_dict, write_state_dict

NET = """
from torch import nn

def build():
    convs = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
"""
CPU = torch.device("cpu")
GREY = Preprocessing(size=8, resize=8, mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder of images, a network, and the checkpoints of its training on wrong labels."""
    root = tmp_path_factory.mktemp("elsewhere")
    pixels, labels = load_digits(return_X_y=True)
    digits = (pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    for part, chosen in (("train", range(500)), ("val", range(500, 1500))):
        for n in chosen:
            place = root / part / f"digit {labels[n]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits[n]).save(place / f"{n}.png")
    (root / "net.py").write_text(NET)
    (root / "ckpt").mkdir()
    torch.manual_seed(0)
    train = open_folder(root / "train", GREY)
    inputs, given = GREY.normalize(train.load()), torch.from_numpy(train.labels.copy())
    wrong = torch.rand(len(given)) < 0.4
    given[wrong] = torch.randint(0, 10, (int(wrong.sum()),))
    model = maker(f"{root}/net.py:build", classes=10, preprocessing=GREY)()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for epoch in range(25):
        for index in torch.randperm(len(given)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[index]), given[index]).backward()
            optimizer.step()
        torch.save({"epoch": epoch, "state_dict": model.state_dict()}, root / f"ckpt/e{epoch}.pt")
    return root


@pytest.fixture
def fmn(elsewhere, monkeypatch, capsys, tmp_path):
    """Run `fmn fuse` on them as a person would, from another folder."""
    monkeypatch.chdir(tmp_path)
    known = {"checkpoints": f"{elsewhere}/ckpt/*.pt", "model": f"{elsewhere}/net.py:build"}
    known |= {"data": f"{elsewhere}/val", "size": "8", "resize": "8", "mean": "0.5", "std": "0.5"}

    def run(words):
        rest = [f"--{name} {value}" for name, value in known.items() if f"--{name} " not in words]
        monkeypatch.setattr(sys, "argv", ["fmn", "fuse", *" ".join([words, *rest]).split()])
        try:
            main()
            return 0, *capsys.readouterr()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()

    return run


LOAD = """
import sys
sys.modules["fmnlib"] = None  # importing it is an error
import safetensors.torch, torch
sys.path.insert(0, sys.argv[1])
from net import build
model = build()
model.load_state_dict(safetensors.torch.load_file(sys.argv[2]))
inputs, labels = torch.load(sys.argv[3], weights_only=True)
print(float((model.eval()(inputs).argmax(1) == labels).float().mean()))
"""


@pytest.mark.parametrize("network", ["averaged", "distilled"])
def test_one_network_is_written_that_loads_without_us(fmn, elsewhere, tmp_path, network):
    words = f"--network {network} --train {elsewhere}/train --json --save-record mine.npz"
    code, out, err = fmn(words)
    told = json.loads(out)
    assert code == 0
    assert "predicting: 100%" in err  # what it does, and above it how long it will take
    assert told["checkpoints"] == 25
    assert told["test accuracy, fused"] > told["test accuracy, single"] + 0.02
    gain = told["gain, fused"]
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert told["gain, fused"]["value"] == pytest.approx(
        told["test accuracy, fused"] - told["test accuracy, single"]
    )
    # The accuracy that it says is the one that a stranger measures on the same images.
    record = RunRecord.load(tmp_path / "mine.npz")
    (pick, share), *_ = knowledge_fusion(record.split(0)[0], start="best").picks
    assert told["pick 1"] == f"e{pick}.pt, share {share:.3f}"
    test = record.split(0)[1].index
    val = open_folder(elsewhere / "val", GREY)[test]
    stored = GREY.normalize(val.load()), torch.from_numpy(val.labels)
    torch.save(stored, tmp_path / "test.pt")
    script = [sys.executable, "-c", LOAD, elsewhere, tmp_path / "fused.safetensors"]
    done = subprocess.run([*script, tmp_path / "test.pt"], capture_output=True, check=True)
    assert float(done.stdout) == pytest.approx(told[f"test accuracy, {network}"], abs=1e-6)
    mixture = json.loads((tmp_path / "fused.json").read_text())
    assert mixture["checkpoints"][:3] == ["e0.pt", "e1.pt", "e2.pt"]
    assert mixture["checkpoints"][10] == "e10.pt"
    assert sum(mixture["weights"]) == pytest.approx(1)
    assert mixture["classes"][3] == "digit 3"


def test_a_student_is_better_than_what_training_left(fmn, elsewhere):
    told = json.loads(fmn(f"--network distilled --train {elsewhere}/train --json")[1])
    assert told["gain, distilled"]["low"] > 0


def test_nothing_is_overwritten(fmn, tmp_path):
    (tmp_path / "fused.safetensors").write_text("precious")
    code, _, err = fmn("")
    assert (code, err) == (
        2,
        "fmn: fused.safetensors exists; give another name, or move it away\n",
    )
    assert (tmp_path / "fused.safetensors").read_text() == "precious"


def test_people_are_told_how_the_images_were_read(fmn):
    _, out, _ = fmn("--max-picks 1")
    assert "1000 of 10 classes; shorter side to 8 pixels, middle 8 x 8, mean 0.5, std 0.5" in out
    assert "points (" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--size 0", "size is 0 and resize is 8; give 1 or more"),
        ("--mean 0.5 0.5", "mean is (0.5, 0.5) and std is (0.5,); give one or three numbers"),
        (
            "--mean 0.5 0.5 0.5 --std 1 1 1",
            "the model gives no logits for these inputs (",
        ),
        ("--model torchvision:resnet18 --mean 0 0 0 --std 1 1 1", "e0.pt does not fit: 0.bias is"),
        ("--model torchvision:resnet1", "torchvision has no network 'resnet1'; did you mean"),
        ("--model test_resnet", "torchvision:NAME; or give timm:NAME or FILE.py:FUNCTION"),
        ("--model nowhere.py", "which function of it? Give nowhere.py:FUNCTION"),
        ("--model nowhere.py:build", "nowhere.py does not exist; give FILE.py:FUNCTION"),
        ("--checkpoints nothing*.pt", "0 files match 'nothing*.pt'; give two checkpoints or more"),
        ("--data nowhere", "nowhere must hold CLASS/ folders of images"),
        ("--train nowhere", "nowhere must hold CLASS/ folders of images"),
        (
            "--network distilled",
            "--network distilled needs --train, a FOLDER of images or FILE.py:FUNCTION",
        ),
        ("--train DATA", "a student that is taught on the test half proves nothing"),
        ("--lr nan", "epochs is 10 and lr is nan; give more than 0"),
        ("--save-record mine", "save_record is mine; give a name that ends in .npz"),
        ("--mean 127", "mean is (127.0,); give it for pixels from 0 to 1"),
        ("--split -1", "the split's seed is -1; give 0 or more"),
        ("--network both", 'Invalid value "both" for --network'),
        ("--output fused.pt", "output is fused.pt; give a name that ends in .safetensors"),
        ("--output /proc/fused.safetensors", "/proc/fused.safetensors cannot be written ("),
        ("--epochs 0", "epochs is 0 and lr is 0.01; give more than 0"),
        ("--window 20", "window is 20 with 25 kept epochs; allow 0 to 12"),
        ("--mix best --window 2", "leave out --start, --window, --max-picks and --grid"),
        ("digits", "give a run, or --checkpoints 'ckpt/*.pt' --model NAME --data FOLDER"),
    ],
)
def test_bad_input_is_told_in_one_line(fmn, elsewhere, tmp_path, words, told):
    code, out, err = fmn(words.replace("DATA", str(elsewhere / "val")))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]  # progress may stand above it
    assert last.startswith("fmn: ")
    assert told in last
    assert not list(tmp_path.glob("fused*"))


def test_images_that_do_not_fit_in_memory_give_the_same_network(fmn, tmp_path, monkeypatch):
    reports = []
    for limit, name in ((images.IN_MEMORY, "held"), (0, "read")):
        monkeypatch.setattr(images, "IN_MEMORY", limit)
        reports.append(json.loads(fmn(f"--json --output {name}.safetensors")[1]))
    del reports[0]["written"], reports[1]["written"]
    assert reports[0] == reports[1]
    held, read = (read_state_dict(tmp_path / f"{name}.safetensors") for name in ("held", "read"))
    assert all(torch.equal(tensor, read[name]) for name, tensor in held.items())


def test_options_of_files_are_refused_for_a_run(fmn, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "fmn fuse digits --network distilled".split())
    with pytest.raises(SystemExit, match="2"):
        main()
    assert (
        "'digits' is given with --model, --data or the like; they go with"
        in capsys.readouterr().err
    )


def test_a_network_that_was_written_is_no_checkpoint(tmp_path):
    for name in ("a", "b"):
        safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    write_state_dict(tmp_path / "fused.safetensors", {"w": torch.ones(1)})
    found = find_checkpoints(f"{tmp_path}/*.safetensors")
    assert [path.name for path in found] == ["a.safetensors", "b.safetensors"]


def test_a_digit_that_is_no_decimal_may_be_in_a_name(tmp_path):
    for name in ("e10.pt", "e9².pt", "e9.pt"):
        (tmp_path / name).write_bytes(name.encode())
    found = find_checkpoints(f"{tmp_path}/*.pt")
    assert [path.name for path in found] == ["e9.pt", "e9².pt", "e10.pt"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import nowhere_at_all", "cannot be imported (ModuleNotFoundError"),
        ("def build(classes): ...", "it must need no argument"),
        ("def build(): return 7", "returned a int; return the network"),
        ("def build(): return 1 / 0", "cannot be called (ZeroDivisionError"),
    ],
)
def test_a_function_that_makes_no_network_is_told(tmp_path, body, told):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(InputError, match=re.escape(told)):
        maker(f"{tmp_path}/mine.py:build", classes=10, preprocessing=GREY)


def test_a_file_finds_the_modules_beside_it_and_runs_once(tmp_path):
    (tmp_path / "beside_it.py").write_text("from torch import nn\nNet = nn.Flatten\n")
    file = tmp_path / "imports_beside.py"
    file.write_text(
        "from beside_it import Net\n"
        "with open(__file__ + '.log', 'a') as log: log.write('imported')\n"
        "def build(): return Net()\n"
        "def data(): return []\n"
    )
    for _ in range(2):
        maker(f"{file}:build", classes=10, preprocessing=GREY)()
    assert Path(f"{file}.log").read_text() == "imported"
    assert sys.modules["imports_beside"].__file__ == str(file)
    with pytest.raises(InputError, match="imports_beside.py:data returned no batch; return"):
        open_labelled(Path(f"{file}:data"), GREY)


def test_grey_is_the_grey_of_torchvision_on_images(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(2):
        (tmp_path / f"{n}").mkdir()
        colours = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / f"{n}" / "0.png")
    seen = open_folder(tmp_path, GREY).load()[1, 0].numpy()
    np.testing.assert_array_equal(seen, np.asarray(Image.fromarray(colours).convert("L")))


def test_checkpoints_come_in_the_order_of_training(tmp_path):
    for name in ("epoch_10.pt", "epoch_2.pt", "epoch_1.pt"):
        (tmp_path / name).touch()
    found = find_checkpoints(f"{tmp_path}/*.pt")
    assert [path.name for path in found] == ["epoch_1.pt", "epoch_2.pt", "epoch_10.pt"]
    for step in (900, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    found = find_checkpoints(f"{tmp_path}/checkpoint-*/model.safetensors")
    assert [path.parent.name for path in found] == ["checkpoint-900", "checkpoint-1000"]


@pytest.mark.parametrize(
    "form", ["plain.pt", "nested.pth", "reference.pth", "parallel.pt", "plain.safetensors"]
)
def test_every_usual_form_of_a_checkpoint_is_read(tmp_path, form):
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    state, path = net.state_dict(), tmp_path / form
    if form == "plain.safetensors":
        write_state_dict(path, state)
        assert safetensors.torch.load_file(path).keys() == state.keys()
    elif form == "nested.pth":
        torch.save({"model_state_dict": state, "optimizer_state_dict": {"lr": 0.1}}, path)
    elif form == "reference.pth":  # of torchvision's reference scripts
        torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    elif form == "parallel.pt":
        extra = {"criterion.weight": torch.ones(2)}
        torch.save({f"module.{k}": v for k, v in state.items()} | extra, path)
    else:
        torch.save(state, path)
    other = load_weights(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), read_state_dict(path))
    inputs = torch.randn(5, 2)
    torch.testing.assert_close(other(inputs), net(inputs))


class Surprise:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"state_dict": Surprise()}, tmp_path / "bad.pt")
    with pytest.raises(
        InputError, match=r"bad\.pt holds no state_dict but objects of builtins\.print"
    ):
        read_state_dict(tmp_path / "bad.pt")
    torch.save({"state_dict": {"w": torch.ones(1)}, "more": Surprise()}, tmp_path / "bad.pt")
    assert read_state_dict(tmp_path / "bad.pt").keys() == {"w"}
    assert capsys.readouterr().out == ""


class Settings:
    """Hyper-parameters of somebody's own class."""

    def __init__(self):
        self.optimizer = torch.optim.Adam


class Mapped(dict):
    """What torch cannot build without the class."""


def test_objects_among_the_settings_are_left_alone(tmp_path):
    """As Lightning, timm and one's own scripts save them: paths, classes, objects of any kind."""
    about = {
        "root": Path("data"),
        "act": nn.ReLU,
        "own": Settings(),
        "args": argparse.Namespace(p=Path()),
    }
    about |= {"device": torch.device("cpu"), "when": datetime.date(2026, 1, 1)}
    stored = {"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": about, "epoch": 3}
    torch.save(stored, tmp_path / "e.ckpt")
    assert read_state_dict(tmp_path / "e.ckpt").keys() == {"weight"}


def test_what_cannot_be_left_alone_is_named(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}, "own": Mapped(lr=1)}, tmp_path / "e.pt")
    with pytest.raises(
        InputError, match=r"e\.pt cannot be read \(it holds objects of .*Mapped\); sa"
    ):
        read_state_dict(tmp_path / "e.pt")


def test_a_whole_model_is_named_with_the_way_out(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "net.pt")
    told = (
        r"net\.pt holds no state_dict but objects of .*torch\.nn\.modules\.linear\.Linear.*; save"
    )
    with pytest.raises(InputError, match=told):
        read_state_dict(tmp_path / "net.pt")


def test_statistics_that_lag_behind_the_last_weights_are_no_other_normalisation(
    fmn, elsewhere, tmp_path
):
    """The last epoch's alone are far off, as after a few large steps; the images are right."""
    shutil.copytree(elsewhere / "ckpt", tmp_path / "ckpt")
    last = torch.load(elsewhere / "ckpt" / "e24.pt")
    last["state_dict"]["1.running_mean"] += 0.5
    torch.save(last, tmp_path / "ckpt" / "e24.pt")
    code, out, _ = fmn("--checkpoints ckpt/*.pt --json")
    told = json.loads(out)
    assert code == 0
    assert told["test accuracy, single"] < told["test accuracy, best"] - 0.15


def test_images_that_are_normalised_in_another_way_are_refused(fmn, tmp_path):
    code, _, err = fmn("--mean 0 --std 0.1 --save-record seen.npz")
    assert code == 2
    assert "when BatchNorm is estimated anew on these images; give --mean, --std and --size" in err
    assert not (tmp_path / "seen.npz").exists()


def test_validation_images_among_the_training_images_are_noticed(fmn, elsewhere, tmp_path):
    shutil.copytree(elsewhere / "val", tmp_path / "copy")
    code, _, err = fmn("--train copy")
    assert code == 2
    assert re.search(r"of \d+ images of data, such as \d+\.png, are in train too", err)


def test_a_network_of_timm(fmn):
    code, _, err = fmn("--model timm:resnet18")
    assert code == 2
    assert re.search(r"e0\.pt does not fit: .* in the model; check the model's name", err)
    assert "timm makes no 'resnet3.14'" in fmn("--model timm:resnet3.14")[2]


@pytest.mark.parametrize("writer", ["timm", "torchvision", "lightning"])
def test_the_moving_average_can_be_chosen(tmp_path, writer):
    net, average = nn.Linear(2, 1), nn.Linear(2, 1)
    path = tmp_path / "e1.pth.tar"
    if writer == "timm":
        stored = {"state_dict": net.state_dict(), "state_dict_ema": average.state_dict()}
        torch.save(stored | {"args": argparse.Namespace(model="vit")}, path)
    elif writer == "torchvision":
        mean = torch.optim.swa_utils.AveragedModel(average)
        torch.save({"model": net.state_dict(), "model_ema": mean.state_dict()}, path)
    else:
        now, mean = ({f"net.{k}": v for k, v in n.state_dict().items()} for n in (net, average))
        torch.save({"state_dict": mean, "current_model_state": now}, path)
    for kind, source in (("model", net), ("ema", average)):
        loaded = load_weights(nn.Linear(2, 1), read_state_dict(path, kind))
        torch.testing.assert_close(loaded.weight, source.weight)


def test_a_file_without_a_moving_average_says_what_it_has(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "epoch": 1}, tmp_path / "e1.pt")
    with pytest.raises(InputError, match=r"has no moving average \(.*but model, epoch; leave out"):
        read_state_dict(tmp_path / "e1.pt", "ema")


@pytest.mark.parametrize(
    ("names", "copy", "pattern"),
    [
        (
            ["checkpoint-0.pth.tar", "checkpoint-1.pth.tar", "model_best.pth.tar"],
            "model_best.pth.tar",
            "checkpoint-[0-9]*.pth.tar",
        ),
        (
            ["epoch=1-step=20.ckpt", "epoch=2-step=40.ckpt", "last.ckpt"],
            "last.ckpt",
            "epoch=[0-9]*.ckpt",
        ),
        (["model_0.pth", "model_1.pth", "checkpoint.pth"], "checkpoint.pth", "model_[0-9]*.pth"),
        (["e1.pt", "e10.pt", "best_e1.pt"], "best_e1.pt", "e[0-9]*.pt"),
        (
            ["checkpoint_0.pth", "checkpoint_1.pth", "checkpoint.pth"],
            "checkpoint.pth",
            "checkpoint_[0-9]*.pth",
        ),
    ],
)
def test_a_copy_of_a_checkpoint_is_not_taken_for_the_final_network(tmp_path, names, copy, pattern):
    for name in names:
        (tmp_path / name).touch()
    told = f"{copy} may be a copy of another checkpoint; give a pattern without it, such as "
    with pytest.raises(InputError, match=re.escape(f"{told}'{tmp_path}/{pattern}'")):
        find_checkpoints(f"{tmp_path}/*")
    assert [path.name for path in find_checkpoints(f"{tmp_path}/{pattern}")] == names[:2]
    (tmp_path / copy).unlink()
    assert [path.name for path in find_checkpoints(f"{tmp_path}/*")] == names[:2]


def test_where_no_pattern_tells_copies_apart_an_example_is_shown(tmp_path):
    for name in ("e1.pt", "e2.pt", "e2_best.pt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"such as 'ckpt/\*\[0-9\]\.pt', or a name with"):
        find_checkpoints(f"{tmp_path}/*")


def test_a_folder_further_up_that_is_called_last_is_no_copy(tmp_path):
    for part in ("a", "b"):
        for step in (1, 2):
            file = tmp_path / "last" / part / f"checkpoint-{step}" / "model.bin"
            file.parent.mkdir(parents=True)
            file.touch()
    assert len(find_checkpoints(f"{tmp_path}/last/*/checkpoint-*/model.bin")) == 4


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors", "text.pt", "list.pt", "empty.pt"])
def test_damaged_and_foreign_files_are_told(tmp_path, name):
    path = tmp_path / name
    if name == "text.pt":
        path.write_text("hello")
    elif name == "list.pt":
        torch.save([1, 2], path)
    elif name == "empty.pt":
        path.touch()
    else:
        state = {"weight": torch.ones(100)}
        write_state_dict(path, state) if "safe" in name else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=f"{name}.*; save"):
        read_state_dict(path)


def test_a_file_that_holds_something_else_says_what(tmp_path):
    torch.save({"net": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "mine.pt")
    with pytest.raises(InputError, match=r"mine\.pt holds no state_dict but net, epoch; save"):
        read_state_dict(tmp_path / "mine.pt")


def test_a_damaged_image_and_a_diverged_checkpoint_are_named(elsewhere, tmp_path):
    val = open_labelled(elsewhere / "val", GREY)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(net[1].bias, np.nan)
    torch.save(net.state_dict(), tmp_path / "e7.pt")
    with pytest.raises(InputError, match=r"e7\.pt predicts NaN: its training diverged"):
        record_checkpoints(net, [tmp_path / "e7.pt"], val, tmp_path, device=CPU)
    shutil.copytree(elsewhere / "val", tmp_path / "val")
    image = sorted((tmp_path / "val").glob("*/*"))[-1]
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(InputError, match=rf"{image.name} cannot be read as an image .*; fix it"):
        open_folder(tmp_path / "val", GREY).load()


def test_bad_options_leave_no_record_behind(fmn, tmp_path):
    for words in ("--window 20", "--split -1", "--max-picks 0"):
        code, _, err = fmn(f"{words} --save-record {tmp_path}/seen.npz")
        assert (code, "predicting" in err) == (2, False)
        assert not (tmp_path / "seen.npz").exists()


def test_a_network_of_torchvision_in_colour(elsewhere, tmp_path, fmn):
    make = maker("torchvision:squeezenet1_1", classes=10, preprocessing=Preprocessing(size=32))
    words = f"--checkpoints {tmp_path}/s*.pt --model torchvision:squeezenet1_1"
    words += f" --data {elsewhere}/train"
    words += " --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --resize 0"
    words += " --size 32 --json --output x.safetensors"
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save(make().state_dict(), tmp_path / f"s{seed}.pt")
    code, _, err = fmn(words)
    assert code == 2
    assert "no checkpoint is better than chance" in err.splitlines()[-1]
    colours = {0: (0, 200, 90), 5: (200, 0, 90)}
    for n in range(500):
        digit = 5 * (n % 2)
        place = tmp_path / "more" / f"digit {digit if n >= 20 else n // 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colours[digit]).save(place / f"{n}.png")
    net, inputs = make().eval(), torch.tensor([*colours.values()])[..., None, None] / 255
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (Preprocessing().mean, Preprocessing().std)
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        seen = net(((inputs - mean) / std).expand(2, 3, 32, 32))
        F.cross_entropy(seen, torch.tensor([0, 5])).backward()
        optimizer.step()
    torch.save(net.state_dict(), tmp_path / "s3.pt")
    code, out, _ = fmn(words.replace(f"{elsewhere}/train", f"{tmp_path}/more"))
    assert code == 0
    assert json.loads(out)["final"] == "s3.pt"
    assert "shorter side to 37 pixels" in json.loads(out)["images"]


def test_batchnorm_is_estimated_on_images_of_all_classes_at_a_time(tmp_path, monkeypatch):
    """A folder lies in order of class; batches of one class have statistics of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))\n"
    )
    for shade in (0, 1):
        (tmp_path / "val" / str(shade)).mkdir(parents=True)
        for n in range(300):
            Image.new("L", (8, 8), 200 * shade + n % 50).save(
                tmp_path / "val" / str(shade) / f"{n}.png"
            )
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
    pixels = GREY.normalize(open_folder(tmp_path / "val", GREY).load())
    net[0].running_mean[:], net[0].running_var[:] = pixels.mean(), pixels.var()
    nn.init.constant_(net[2].bias, 0.0)
    net[2].weight.data = torch.tensor([[-1.0], [1.0]]).expand(2, 64).clone()
    for n in range(2):
        torch.save(net.state_dict(), tmp_path / f"e{n}.pt")
    words = "--checkpoints e*.pt --model net.py:build --data val --size 8 --resize 8"
    monkeypatch.setattr(sys, "argv", f"fmn fuse {words} --mean 0.5 --std 0.5 --window 0".split())
    with pytest.raises(SystemExit, match="0"):
        main()
    written = read_state_dict(tmp_path / "fused.safetensors")
    assert written["0.running_var"].item() == pytest.approx(pixels.var().item(), rel=0.1)
