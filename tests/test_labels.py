"""Wrong training labels are ranked first: by hand, on runs, folders and tracked loops."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import fmnlib
from fmnlib import InputError, RunConfig, labels, runs
from fmnlib.config import CheckpointFiles
from fmnlib.external import mixture_on_training
from fmnlib.fusion import around, uniform
from fmnlib.training import train

NOISY = RunConfig(epochs=8, noise="symmetric", noise_rate=0.4)


def test_scores_are_margins_worked_out_by_hand():
    probs = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.25, 0.5, 0.25]])
    table = fmnlib.suspects(probs, [0, 1, 0], files=["a", "b", "c"], classes=["x", "y", "z"])
    assert table.to_dict("list") == {
        "index": [1, 2, 0],
        "file": ["b", "c", "a"],
        "given": ["y", "x", "x"],
        "suggested": ["z", "y", "y"],
        "score": [0.625, 0.25, -0.25],
    }
    assert labels.noise_rate(table) == pytest.approx(2 / 3)
    wrong = np.array([True, True, False])
    assert labels.detection(table, wrong) == {"AUROC": 0.5, "precision": 0.5}
    assert labels.detection(table, ~wrong | wrong) == {}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([0], {}, r"labels are of shape \(1,\); give \(2,\)"),
        ([0.0, 1.0], {}, "labels are float64"),
        ([0, 2], {}, "labels run from 0 to 2; allow 0 to 1"),
        ([0, 1], {"classes": ["a"]}, "1 names of 2 classes"),
        ([0, 1], {"files": ["a"]}, "files are"),
    ],
)
def test_what_does_not_fit_is_refused(given, options, message):
    with pytest.raises(InputError, match=message):
        fmnlib.suspects([[0.5, 0.5], [0.5, 0.5]], given, **options)


def test_a_run_ranks_its_own_wrong_labels(fmn, runs_root, tmp_path):
    record = train(NOISY, runs.folder(NOISY))
    csv, page = tmp_path / "labels.csv", tmp_path / "labels.html"
    command = "labels", NOISY.id, "--csv", csv, "--html", page, "--json"
    shown = json.loads(fmn(*command)[1])
    table = pd.read_csv(csv)
    assert len(table) == shown["samples"] == 1000
    assert shown["true noise rate"] == 0.4
    assert abs(shown["estimated noise rate"] - 0.4) < 0.05
    assert shown["AUROC"] > 0.95
    assert shown["precision"] > 0.85
    assert page.read_text().count("<img") == 60
    # The same by hand: the mixture's predictions of the unaugmented training images.
    val = record.split(0)[0]
    samples = labels.of_run(
        runs.folder(NOISY), record, fmnlib.knowledge_fusion(val, start="best"), "cpu"
    )
    again = fmnlib.suspects(samples.probs, samples.given)
    pd.testing.assert_frame_equal(table, again, check_exact=False)
    assert fmnlib.knowledge_fusion(val).networks != shown["networks"] > 1
    assert f"{csv} exists" in fmn(*command)[2]  # nothing that is written is lost


def test_images_in_folders_are_named(runs_root, tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for name, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 20, level + 20, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "train/dark/0.png").rename(tmp_path / "train/light/dark_0.png")
    config = RunConfig(dataset=f"folder:{tmp_path}", image_size=16, epochs=3, batch_size=8)
    record = train(config, runs.folder(config))
    samples = labels.of_run(runs.folder(config), record, around(record, 1, window=0), "cpu")
    table = fmnlib.suspects(
        samples.probs, samples.given, files=samples.files, classes=samples.classes
    )
    assert table.loc[0, ["file", "given", "suggested"]].tolist() == [
        "light/dark_0.png",
        "light",
        "dark",
    ]
    assert "light/dark_0.png" in labels.page(samples, table, title="Labels")


def test_a_tracked_loop_ranks_the_samples_of_a_second_tracker(fmn, tmp_path):
    probs = np.array([[[0.6, 0.4], [0.6, 0.4]], [[0.9, 0.1], [0.2, 0.8]]])
    known, trained = (
        fmnlib.Tracker(tmp_path / name, given)
        for name, given in (("val", [0, 1] * 4), ("seen", [1, 1]))
    )
    for epoch in probs:
        known.note(np.tile(epoch, (4, 1)))
        trained.note(epoch)
    csv, val, seen = (tmp_path / name for name in ("labels.csv", "val", "seen"))
    shown = json.loads(fmn("labels", val, "--csv", csv, "--train", seen, "--json")[1])
    assert shown["estimated noise rate"] == 0.5
    assert "AUROC" not in shown
    table = pd.read_csv(csv)
    assert table["index"].tolist() == [0, 1]
    assert table["score"].tolist() == pytest.approx([0.8, -0.6], abs=1e-3)
    assert (
        "a Tracker's folder with --train" in fmn("labels", val, "--csv", tmp_path / "other.csv")[2]
    )


def test_where_the_best_epoch_starts_validation_accuracy_cannot_fall_below_it(runs_root):
    rng = np.random.default_rng(0)
    for _ in range(20):
        probs = rng.dirichlet(np.ones(4), (6, 60))
        val = fmnlib.RunRecord.from_arrays(probs, rng.integers(0, 4, 60))
        best = fmnlib.knowledge_fusion(val, start="best")
        right = fmnlib.fuse(val, best).argmax(1) == val.labels
        assert right.mean() >= val.accuracy.max()
        assert best.picks == fmnlib.knowledge_fusion(val, start="best", max_picks=9).picks
    with pytest.raises(InputError, match="start is \"first\"|start is 'first'"):
        fmnlib.knowledge_fusion(val, start="first")


def test_refined_labels_are_the_teachers(runs_root):
    import torch

    from fmnlib.config import StudentConfig
    from fmnlib.distillation import soft_target_loss

    logits, probs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.75]])
    refined = StudentConfig(labels="refined", soft_share=0.0)
    found = soft_target_loss(logits, probs, torch.tensor([0]), refined)
    assert found.item() == pytest.approx(np.log(1 + np.e))  # of class 1, the teacher's
    given = dataclasses.replace(refined, labels="given")
    found = soft_target_loss(logits, probs, torch.tensor([0]), given)
    assert found.item() == pytest.approx(np.log(1 + np.exp(-1)))


def test_checkpoint_files_rank_the_labels_of_a_folder(fmn, tmp_path, monkeypatch):
    """As the guide's loop makes them: a small network, digits in folders of classes."""
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    pixels, truth = load_digits(return_X_y=True)
    pixels, truth = pixels[:700].astype(np.float32) / 16, truth[:700]
    rng = np.random.default_rng(0)
    other = (truth + rng.integers(1, 10, 700)) % 10
    given = np.where(rng.random(700) < 0.3, other, truth)
    for n in range(700):
        folder = tmp_path / ("train" if n < 500 else "val") / str((given if n < 500 else truth)[n])
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((255 * pixels[n]).astype(np.uint8).reshape(8, 8))
        image.save(folder / f"{n}.png")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    hidden = nn.Linear(64, 128)\n"
        "    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(128, 10))\n"
    )
    import torch
    from torch.nn import functional as F

    scope: dict[str, object] = {}
    exec((tmp_path / "net.py").read_text(), scope)
    torch.manual_seed(0)
    net, inputs, targets = scope["build"](), torch.from_numpy(pixels), torch.from_numpy(given)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for epoch in range(12):
        for batch in torch.randperm(500).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        torch.save(net.state_dict(), tmp_path / f"e{epoch}.pt")
    words = ["--model", "net.py:build", "--size", 8, "--resize", 8, "--mean", 0, "--std", 1]
    words += ["--checkpoints", "e*.pt", "--data", "val", "--json"]
    assert "--train is missing" in fmn("labels", *words)[2]
    code, out, _ = fmn("labels", *words, "--train", "train", "--html", "wrong.html")
    assert code == 0
    assert abs(json.loads(out)["estimated noise rate"] - 0.3) < 0.08
    table = pd.read_csv("labels.csv", dtype={"given": str})
    number = table["file"].str.extract(r"(\d+)\.png")[0].astype(int).to_numpy()
    assert (table["given"] == given[number].astype(str)).all()
    wrong = (given != truth)[number]
    assert wrong[: wrong.sum()].mean() > 0.8
    assert "suggested" in (tmp_path / "wrong.html").read_text()
    without_model = "--checkpoints", "e*.pt", "--data", "val"  # not a run of any name
    for options in ((), without_model):
        _, _, err = fmn("labels", "--csv", "other.csv", *options)
        assert "give a run, or --checkpoints" in err
    # Of equal weights, the mixture is the mean of the networks' probabilities, in file order.
    shape = {"size": 8, "resize": 8, "mean": (0.0,), "std": (1.0,)}
    files = CheckpointFiles(
        checkpoints="e*.pt", model="net.py:build", data=Path("val"), train=Path("train"), **shape
    )
    samples, _ = mixture_on_training(files, uniform, 0)
    assert samples.classes == sorted(path.name for path in Path("train").iterdir())
    number = [int(Path(name).stem) for name in samples.files]
    by_hand = torch.zeros(500, 10)
    for epoch in range(12):
        net.load_state_dict(torch.load(f"e{epoch}.pt"))
        by_hand += net(inputs[number]).softmax(1).detach() / 12
    np.testing.assert_allclose(samples.probs, by_hand, atol=0.01)
