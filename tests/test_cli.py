"""The command `fmn`, run as a person runs it: another process, real files, exit codes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fmnlib import RunRecord

QUICK = "--noise symmetric --noise-rate 0.4 --epochs 25 --train-samples 500".split()


def told(fmn, *words):
    """The one line that bad input is answered with."""
    code, out, err = fmn(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_from_training_to_one_network(fmn, runs_root):
    code, out, _ = fmn("train", *QUICK, "--json")
    trained = json.loads(out)
    assert code == 0
    record = RunRecord.load(runs_root / trained["run"])
    assert trained["final accuracy"] == record.accuracy[-1]
    assert (
        json.loads(fmn("diagnose", "digits", "--json")[1])["best accuracy"]
        == record.accuracy.max()
    )
    fused = json.loads(fmn("fuse", "digits", "--json")[1])
    assert fused["test accuracy, fused"] > fused["test accuracy, single"]
    assert (runs_root / trained["run"] / "fusion.json").exists()
    student = json.loads(fmn("distill", "digits", "--json")[1])
    assert student["test accuracy, single"] == fused["test accuracy, single"]
    assert student[f"test accuracy, {fused['networks']} networks fused"] == pytest.approx(
        fused["test accuracy, fused"]
    )
    assert student["test accuracy, student"] > student["test accuracy, single"]
    listed = json.loads(fmn("runs", "--json")[1])
    assert {row["run"] for row in listed} == {trained["run"], student["student"]}


def test_tables_for_people(fmn):
    _, out, _ = fmn("train", *QUICK)
    assert "final accuracy" in out
    assert "max forget fraction" in out
    assert "%" in out
    assert "pick 1" in fmn("fuse", "digits", "--max-picks", 1, "--grid")[1]
    assert "complete" in fmn("runs")[1]


def test_a_student_is_of_the_split_that_its_fusion_was_chosen_on(fmn):
    fmn("train", *QUICK)
    fmn("fuse", "digits", "--split", 1)
    message = told(fmn, "distill", "digits", "--split", 2)
    assert "the fusion was chosen on split 1 and split is 2; leave out --split" in message
    code, out, _ = fmn("distill", "digits", "--json")
    assert code == 0
    assert json.loads(out)["split"] == 1
    assert "final accuracy" in fmn("diagnose", "digits")[1]  # the run, not its student


def test_who_reads_the_beginning_alone_sees_no_error():
    command = [sys.executable, "-m", "fmnlib", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_record_of_another_framework(fmn, tmp_path):
    probs = np.random.default_rng(0).dirichlet(np.ones(3), size=(5, 90))
    probs[:, np.arange(90), np.arange(90) % 3] += 1
    probs /= 2
    RunRecord.from_arrays(probs, np.arange(90) % 3).save(tmp_path / "mine.npz")
    assert fmn("diagnose", tmp_path / "mine.npz")[0] == 0
    assert fmn("fuse", tmp_path / "mine.npz")[0] == 0
    assert "mine.npz has no checkpoints" in told(fmn, "distill", tmp_path / "mine.npz")


@pytest.mark.parametrize("dataset", ["fashion_mnist", "cifar100"])
def test_real_images(fmn, real_data, dataset):
    few = "--train-samples 2000 --eval-samples 1000 --epochs 5 --model resnet8 --width 0.5"
    noise = "--noise symmetric --noise-rate 0.4 --augment crop_flip"
    code, out, _ = fmn("train", "--dataset", dataset, *few.split(), *noise.split(), "--json")
    run = json.loads(out)["run"]
    assert code == 0
    assert (
        json.loads(out)["best accuracy"] > 1.5 * {"fashion_mnist": 0.1, "cifar100": 0.01}[dataset]
    )
    assert json.loads(fmn("diagnose", run, "--json")[1])["final accuracy"] > 0
    assert fmn("fuse", run)[0] == 0
    assert "student" in json.loads(fmn("distill", run, "--json")[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --dataset cifar11", "dataset is 'cifar11'; known are digits"),
        ("train --model resnet81", "model is 'resnet81'; known are convnet"),
        ("train --noise loud", "noise is 'loud'; allowed are none, symmetric"),
        ("train --noise symmetric --noise-rate 1", "noise_rate is 1.0; allowed is at least 0 and"),
        ("train --noise-rate 0.4", "noise_rate is 0.4 with noise=none; make it 0, or choose"),
        ("train --epochs 0", "epochs is 0; allowed is at least 1"),
        ("train --epochs many", 'Invalid value for --epochs: unable to convert "many" into int'),
        ("train --epoch 3", "Unknown option: --epoch. Did you mean --epochs?"),
        ("train --optimizer lion", 'Invalid value "lion" for --optimizer. Choose from'),
        ("train --device toaster", "device is 'toaster', which is not here"),
        ("train --device meta", "device is 'meta', which is not here"),
        ("train --max-minutes nan", "max_minutes is nan; give a number of minutes"),
        ("train --train-samples 1", "digits gives 1 training samples; take more"),
        ("diagnose nothing --html /tmp", "html is /tmp, a folder; give the name of a file"),
        ("train --teacher kf", "Unknown option: --teacher"),
        ("trian", 'Unknown command "trian". Did you mean "train"?'),
        ("diagnose nothing", "no run in .* begins with 'nothing'; `fmn runs` lists them"),
        ("fuse nothing.npz", "nothing.npz does not exist"),
        ("download cifar11", "dataset is 'cifar11'; known are"),
    ],
)
def test_bad_input_is_told_in_one_line(fmn, words, message, runs_root):
    import re

    assert re.search(message.replace("?", "[?]"), told(fmn, *words.split()))
    assert not list(runs_root.glob("*"))


def test_bad_input_on_a_run_leaves_it_as_it_was(fmn, runs_root):
    run = json.loads(fmn("train", *QUICK, "--json")[1])["run"]
    place = runs_root / run
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert "window is 13 with 25 kept epochs; allow 0 to 12" in told(
        fmn, "fuse", run, "--window", 13
    )
    assert "max_picks is 0" in told(fmn, "fuse", run, "--max-picks", 0)
    assert "temperature is 0.0" in told(fmn, "distill", run, "--temperature", 0)
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert before == after
    (place / "record.npz").write_bytes(before[place / "record.npz"][:-50])
    assert "record.npz is damaged or is not a record" in told(fmn, "diagnose", run)
    assert "damaged" in fmn("runs")[1]
    (place / "config.json").write_text("{}}")
    assert "config.json is not a config" in told(fmn, "train", *QUICK)


def test_it_is_installed_as_a_command_and_as_a_module():
    env = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "fmnlib", "train", "--help"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0
    assert "--noise-rate" in done.stdout
    assert "Share of the training labels that are flipped" in done.stdout


def test_a_run_whose_time_is_up_goes_on(fmn, runs_root):
    small = "--epochs 3 --train-samples 100 --eval-samples 50".split()
    code, out, err = fmn("train", *small, "--max-minutes", 0)
    assert (code, out) == (0, "")
    assert "paused after 1 of 3 epochs; the same command resumes it" in err
    assert fmn("train", *small, "--max-minutes", 0)[0] == 0
    code, out, _ = fmn("train", *small, "--max-minutes", 60, "--json")
    assert code == 0
    assert RunRecord.load(runs_root / json.loads(out)["run"]).epochs == 3


def test_a_run_that_is_not_finished_is_told(fmn):
    fmn("train", *QUICK, "--max-minutes", 0)
    assert "is not finished; the same `fmn train` resumes it" in told(fmn, "diagnose", "digits")


def test_a_changed_noise_matrix_is_not_taken_for_the_old_one(fmn, tmp_path, runs_root):
    matrix = tmp_path / "mm.csv"
    words = f"train --train-samples 50 --epochs 2 --noise matrix:{matrix}".split()
    np.savetxt(matrix, np.eye(10), delimiter=",")
    assert fmn(*words)[0] == 0
    before = {path: path.read_bytes() for path in runs_root.rglob("*.npz")}
    np.savetxt(matrix, np.roll(np.eye(10), 1, axis=1), delimiter=",")
    assert "was trained on other labels than its settings give now" in told(fmn, *words)
    assert before == {path: path.read_bytes() for path in runs_root.rglob("*.npz")}


def test_short_runs_and_small_networks_go_all_the_way(fmn):
    """Two epochs allow no window; three images in batches of two would leave one alone."""
    few = "--train-samples 3 --batch-size 2 --epochs 2 --width 0.01".split()
    assert fmn("train", *few)[0] == 0
    code, out, _ = fmn("distill", "digits", "--json")
    assert (code, "student" in json.loads(out)) == (0, True)


def test_a_fusion_that_is_none_is_told(fmn, runs_root):
    run = json.loads(fmn("train", *QUICK, "--json")[1])["run"]
    for weights in ([1.5, *[0.0] * 23, -0.5], 1, [[1.0]], [float("nan")] * 25):
        content = {"weights": weights, "picks": [], "window": 0}
        (runs_root / run / "fusion.json").write_text(json.dumps(content))
        assert "fusion.json holds no fusion; write one with `fmn fuse" in told(fmn, "distill", run)


def test_a_full_disk_is_told_in_one_line(runs_root):
    """The limit is on the size of a file, which the operating system enforces as it does space."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from fmnlib.__main__ import main; main()"
    )
    command = [sys.executable, "-c", script, "train", "--epochs", "2", "--train-samples", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]  # above it stands the bar
    assert (
        "File too large; what was written stays; fix that and give the same command again" in last
    )
    assert "Traceback" not in done.stderr
