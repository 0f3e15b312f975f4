"""Checkpoints of text, tables and tracked loops: from data of any kind to one network."""

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_breast_cancer
from torch.nn import functional as F

from fmnlib import RunRecord
from fmnlib.__main__ import main
from fmnlib.tracker import Tracker

TABLE = """
import numpy as np, torch
from sklearn.datasets import load_breast_cancer
from torch import nn

inputs, labels = load_breast_cancer(return_X_y=True)
inputs = torch.tensor((inputs - inputs.mean(0)) / inputs.std(0), dtype=torch.float32)
labels = torch.tensor(labels)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
wrong = torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.3

def build():
    return nn.Sequential(nn.Linear(30, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))

def val():
    return [(inputs[i], labels[i]) for i in order[200:].split(64)]

def train():
    given = torch.where(wrong, 1 - labels[order[:200]], labels[order[:200]])
    return [(inputs[i], y) for i, y in zip(order[:200].split(50), given.split(50))]
"""

TEXT = """
import torch
from babel import Locale
from transformers import BertConfig, BertForSequenceClassification

LANGUAGES = ("de", "fr", "it", "fi", "tr")
names = [(name, n) for n, code in enumerate(LANGUAGES)
         for name in Locale(code).languages.values() if len(name) > 3]
order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()

def batches(chosen):
    found = []
    for start in range(0, len(chosen), 64):
        rows = [names[i] for i in chosen[start : start + 64]]
        letters = [[1 + ord(c) % 255 for c in name[:24].ljust(24)] for name, _ in rows]
        labels = torch.tensor([label for _, label in rows])
        found.append({"input_ids": torch.tensor(letters), "labels": labels})
    return found

def val():
    return batches(order[:500])

def train():
    return batches(order[500:])

def build():
    config = BertConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                        num_attention_heads=2, num_labels=5, max_position_embeddings=32)
    return BertForSequenceClassification(config)
"""


def module(path, text):
    path.write_text(text)
    scope = {}
    exec(compile(text, path, "exec"), scope)
    return scope


@pytest.fixture
def fmn(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fmn", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def train_and_save(scope, folder, epochs, tracker=None, lr=3e-3):
    torch.manual_seed(0)
    model = scope["build"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    folder.mkdir(exist_ok=True)
    for epoch in range(epochs):
        model.train()
        for batch in scope["train"]():
            optimizer.zero_grad()
            if isinstance(batch, dict):
                loss = model(**batch).loss
            else:
                loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
        torch.save(model.state_dict(), folder / f"e{epoch}.pt")
        if tracker is not None:
            model.eval()
            with torch.no_grad():
                tracker.note(torch.cat([model(x) for x, _ in scope["val"]()]), model, epoch=epoch)
    return model


@pytest.mark.parametrize("network", ["averaged", "distilled"])
def test_a_table_goes_from_checkpoints_to_one_network(fmn, tmp_path, network):
    scope = module(tmp_path / "table.py", TABLE)
    train_and_save(scope, tmp_path / "ckpt", 12)
    words = ["--model", "table.py:build", "--data", "table.py:val", "--train", "table.py:train"]
    words += ["--checkpoints", "ckpt/*.pt", "--network", network, "--json"]
    code, out, err = fmn("fuse", *words)
    assert (code, err.count("Traceback")) == (0, 0)
    told = json.loads(out)
    model = scope["build"]()
    model.load_state_dict(safetensors.torch.load_file("fused.safetensors"))
    model.eval()
    inputs, labels = (torch.cat(part) for part in zip(*scope["val"]()))
    test = np.random.default_rng(0).permutation(len(labels))[len(labels) // 2 :]
    right = (model(inputs).argmax(1) == labels).numpy()[test]
    assert told[f"test accuracy, {network}"] == pytest.approx(right.mean())
    assert {"gain, window", "gain, best", "fused minus best"} <= told.keys()
    assert "gain, averaged, 5 best" in told


def test_text_goes_from_checkpoints_to_one_network(fmn, tmp_path):
    scope = module(tmp_path / "text.py", TEXT)
    train_and_save(scope, tmp_path / "ckpt", 16, lr=1e-3)  # before that it knows two groups
    words = ["--model", "text.py:build", "--data", "text.py:val", "--train", "text.py:train"]
    words += ["--checkpoints", "ckpt/*.pt", "--network", "distilled", "--epochs", 2, "--json"]
    code, out, _ = fmn("fuse", *words, "--save-record", "seen.npz")
    assert code == 0
    told = json.loads(out)
    assert told["test accuracy, distilled"] > told["test accuracy, single"] - 0.1
    assert RunRecord.load("seen.npz").classes == 5
    assert fmn("diagnose", "seen.npz")[0] == 0


@pytest.fixture
def tracked(tmp_path):
    scope = module(tmp_path / "table.py", TABLE)
    labels = torch.cat([y for _, y in scope["val"]()])
    train_and_save(scope, tmp_path / "ckpt", 12, Tracker(tmp_path / "tracked", labels))
    return tmp_path / "tracked"


@pytest.mark.parametrize("network", ["averaged", "distilled"])
def test_a_tracked_folder_goes_straight_to_one_network(fmn, tracked, network):
    words = ["--model", "table.py:build", "--train", "table.py:train", "--network", network]
    code, out, err = fmn("fuse", "tracked", *words, "--output", "one.safetensors")
    assert (code, "predicting" in err) == (0, False)  # nothing is predicted again
    assert "not measured; give --data" in out
    code, out, _ = fmn("fuse", "tracked", *words, "--data", "table.py:val", "--json")
    told = json.loads(out)
    assert 0.5 < told[f"test accuracy, {network}"] <= 1
    first, again = (safetensors.torch.load_file(f"{n}.safetensors") for n in ("one", "fused"))
    if network == "averaged":
        torch.testing.assert_close(first, again)


def test_what_the_advice_names_can_be_mixed(fmn, tracked):
    for mix, networks in (("best", 5), ("window", None), ("kf", None)):
        told = json.loads(fmn("fuse", "tracked", "--mix", mix, "--json")[1])
        assert told["networks"] == (networks or told["networks"])
        same = {"best": "best", "window": "window", "kf": "fused"}[mix]
        assert told["test accuracy, fused"] == told[f"test accuracy, {same}"]
    words = ["--model", "table.py:build", "--train", "table.py:train", "--data", "table.py:val"]
    told = json.loads(fmn("fuse", "tracked", "--mix", "best", *words, "--json")[1])
    assert told["test accuracy, averaged"] == told["test accuracy, averaged, 5 best"]


def test_labels_are_ranked_by_the_fusion_that_was_written(fmn, tracked):
    words = ["--model", "table.py:build", "--train", "table.py:train", "--json"]

    def networks(csv, *more):
        code, out, err = fmn("labels", "tracked", "--csv", csv, *words, *more)
        return json.loads(out)["networks"] if code == 0 else err

    before = networks("before.csv")
    fmn("fuse", "tracked", "--mix", "best", "--split", "3")
    assert (before, networks("after.csv")) == (before, 5)
    assert before != 5
    assert "was chosen on split 3 and split is 1" in networks("other.csv", "--split", "1")
    told = "--network has no use in this `fmn labels`; leave it out"
    assert told in networks("other.csv", "--network", "distilled")


def test_missing_checkpoints_are_named_before_any_work(fmn, tracked):
    for file in (tracked / "checkpoints").iterdir():
        file.unlink()
    words = ["--model", "table.py:build", "--train", "table.py:train"]
    code, _, err = fmn("fuse", "tracked", *words)
    assert code == 2
    assert "that are missing; note the model with every epoch" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "table.py:train"], "other labels than the tracked samples"),
        (["--network", "distilled"], "distilled needs --train"),
        (["--labels", "refined"], "--labels refined is for a student; give --network distilled"),
        ([], "has BatchNorm, to be estimated anew; give --train"),
        (["--train", "table.py:nothing"], "has no function 'nothing'"),
        (["--train", "table.py:once"], "returned a generator; return a DataLoader or a list"),
        (
            ["--train", "table.py:sets"],
            "of table.py:sets, a batch is TensorDataset; give (inputs,",
        ),
    ],
)
def test_data_that_do_not_fit_are_told_in_one_line(fmn, tracked, tmp_path, words, told):
    with (tmp_path / "table.py").open("a") as file:
        file.write("\ndef once():\n    return (batch for batch in train())\n")
        file.write("\ndef sets():\n    return [torch.utils.data.TensorDataset(inputs)]\n")
    code, _, err = fmn("fuse", "tracked", "--model", "table.py:build", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert told in err


def test_batches_in_another_order_each_time_are_refused(fmn, tmp_path):
    scope = module(tmp_path / "table.py", TABLE)
    train_and_save(scope, tmp_path / "ckpt", 2)
    with (tmp_path / "table.py").open("a") as file:
        file.write("""
def shuffled():
    data = torch.utils.data.TensorDataset(inputs, labels)
    return torch.utils.data.DataLoader(data, 50, shuffle=True)
""")
    words = [
        "--model",
        "table.py:build",
        "--train",
        "table.py:train",
        "--checkpoints",
        "ckpt/*.pt",
    ]
    code, _, err = fmn("fuse", *words, "--data", "table.py:shuffled")
    assert code == 2
    assert "come in another order in each pass; use shuffle=False" in err


def test_the_mixture_gives_targets_where_there_are_no_weights():
    """Staged predictions of boosting: the guide's way to a student without torch."""
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.tree import DecisionTreeRegressor

    from fmnlib import fuse, knowledge_fusion

    inputs, labels = load_breast_cancer(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    learn, held = order[:200], order[200:]
    given = np.where(rng.random(200) < 0.3, 1 - labels[learn], labels[learn])
    booster = GradientBoostingClassifier(n_estimators=40, learning_rate=0.3).fit(
        inputs[learn], given
    )
    stages = (np.array(list(booster.staged_predict_proba(inputs[part]))) for part in (held, learn))
    record, train = (
        RunRecord.from_arrays(p, y) for p, y in zip(stages, (labels[held], given), strict=True)
    )
    val, test = record.split(0)
    targets = fuse(train, knowledge_fusion(val))
    assert targets.shape == (200, 2)
    student = DecisionTreeRegressor(max_depth=3, random_state=0).fit(inputs[learn], targets)
    right = student.predict(inputs[held][test.index]).argmax(1) == test.labels
    assert right.mean() > test.accuracy[-1]
