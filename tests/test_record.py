"""fmnlib.record: what is saved is read back, halves, damaged files, arrays from elsewhere."""

import contextlib
import dataclasses
import io
import json
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fmnlib import InputError, RunConfig, RunRecord
from fmnlib.config import StudentConfig
from fmnlib.record import LOSS_EDGES

EPOCHS, SAMPLES, CLASSES = 6, 40, 3
RNG = np.random.default_rng(0)
PROBS = RNG.dirichlet(np.ones(CLASSES), (EPOCHS, SAMPLES)).astype(np.float16)
LABELS = RNG.integers(0, CLASSES, SAMPLES)


@pytest.fixture
def record():
    """A record with every field filled."""
    return dataclasses.replace(
        RunRecord.from_arrays(PROBS, LABELS).keep([1, 3, 5]),
        curves={"lr": np.linspace(1, 0, EPOCHS, dtype=np.float32), "loss": np.ones(EPOCHS)},
        loss_histogram=RNG.integers(0, 9, (EPOCHS, 2, len(LOSS_EDGES) - 1)),
        config=RunConfig(seed=3, noise="human"),
        provenance={"device": "cpu", "versions": {"numpy": "2"}, "seconds": 1.5},
    )


def assert_equal(one, other):
    for field in dataclasses.fields(RunRecord):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "curves":
            assert list(a) == list(b)
            a, b = list(a.values()), list(b.values())
        np.testing.assert_equal(a, b)


@contextlib.contextmanager
def full_disk(limit):
    """Let no file grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_is_read_back(record, tmp_path):
    record.save(tmp_path / "deep" / "record.npz")
    assert_equal(RunRecord.load(tmp_path / "deep" / "record.npz"), record)
    assert_equal(RunRecord.load(tmp_path / "deep"), record)
    val, _ = record.split(0)
    val.save(tmp_path / "val.npz")
    assert_equal(RunRecord.load(str(tmp_path / "val.npz")), val)
    bare = RunRecord.from_arrays(PROBS, LABELS)
    bare.save(tmp_path / "bare.npz")
    assert_equal(RunRecord.load(tmp_path / "bare.npz"), bare)


def test_a_light_record_lacks_only_its_probabilities(record, tmp_path):
    record.save(tmp_path / "record.npz", light=True)
    assert_equal(RunRecord.load(tmp_path), dataclasses.replace(record, probs=None))
    np.save(tmp_path / "probs.npy", record.probs)
    again = RunRecord.load(tmp_path)
    assert isinstance(again.probs, np.memmap)
    assert_equal(again, record)
    np.save(tmp_path / "probs.npy", record.probs[1:])
    with pytest.raises(InputError, match="probs.npy is not what the record says"):
        RunRecord.load(tmp_path)


def test_predictions_are_taken_before_probabilities_are_rounded(tmp_path):
    probs = np.array([[[0.5 - 1e-6, 0.5 + 1e-6]]])
    record = RunRecord.from_arrays(probs, [1])
    record.save(tmp_path / "record.npz")
    again = RunRecord.load(tmp_path)
    assert again.probs.argmax() == 0
    assert again.accuracy.tolist() == record.accuracy.tolist() == [1]


def test_the_final_record_scores_as_the_last_epoch_does(record):
    last = record.final()
    assert last.epochs == 1
    assert last.accuracy[0] == record.accuracy[-1]
    np.testing.assert_array_equal(last.probs[0], record.probs[-1])
    assert last.curves["lr"].tolist() == [0.0]


def damage(content):
    """What can become of a file: cut short, one bit flipped, or another file altogether."""
    rng = np.random.default_rng(0)
    for length in rng.integers(0, len(content), 40):
        yield content[:length]
    for place in rng.integers(0, len(content), 400):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield bytes(flipped)
    for arrays in ({}, {"about": np.array("{}")}, {"about": np.array([{}], dtype=object)}):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        yield buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, PROBS)
    yield from (buffer.getvalue(), b"", b"{}", b"PK\x05\x06")


def test_damaged_and_foreign_files_are_refused_and_left_alone(record, tmp_path):
    path = tmp_path / "record.npz"
    record.save(path)
    told = []
    for content in damage(path.read_bytes()):
        path.write_bytes(content)
        try:
            assert_equal(RunRecord.load(path), record)  # a date in the zip is no content
        except InputError as error:
            told.append(str(error))
        assert path.read_bytes() == content
    assert len(told) > 350
    assert {"is damaged or is no record" in line for line in told} == {True}
    assert {len(line.splitlines()) for line in told} == {1}
    with pytest.raises(InputError, match="does not exist"):
        RunRecord.load(tmp_path / "none.npz")


def test_a_changed_member_fails_its_checksum(record, tmp_path):
    record.save(tmp_path / "record.npz")
    with zipfile.ZipFile(tmp_path / "record.npz") as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(tmp_path / "stored.npz", "w") as plain:  # not compressed
        for name, content in members.items():
            plain.writestr(name, content)
    content = bytearray((tmp_path / "stored.npz").read_bytes())
    place = content.index(LABELS.tobytes())
    content[place] ^= 1
    (tmp_path / "stored.npz").write_bytes(content)
    with pytest.raises(InputError, match="Bad CRC-32 for file 'labels"):
        RunRecord.load(tmp_path / "stored.npz")


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (PROBS[0], LABELS, r"probs \(40, 3\) and labels \(40,\); give probs \[epochs, samples"),
        (PROBS, LABELS[1:], r"labels \(39,\); give probs"),
        (PROBS, LABELS[:, None], r"labels \(40, 1\); give probs"),
        (PROBS[:0], LABELS, r"probs \(0, 40, 3\)"),
        (PROBS[:, :0], LABELS[:0], r"probs \(6, 0, 3\)"),
        (PROBS, LABELS.astype(float), "labels are float64; give integer classes"),
        (PROBS, LABELS + 1, "labels run from 1 to 3; with 3 classes allow 0 to 2"),
        (PROBS, LABELS - 1, "labels run from -1 to 1; with 3 classes allow 0 to 2"),
        (PROBS * 2, LABELS, "epoch 0 are not finite, negative or not of sum 1; apply a softmax"),
        (PROBS - [0.5, -0.5, 0], LABELS, "epoch 0 are not finite, negative"),
        (
            np.where(np.arange(EPOCHS)[:, None, None] == 4, np.nan, PROBS),
            LABELS,
            "epoch 4 are not",
        ),
        (
            np.where(np.arange(EPOCHS)[:, None, None] == 5, np.inf, PROBS),
            LABELS,
            "epoch 5 are not",
        ),
    ],
)
def test_arrays_that_are_no_record_are_refused(probs, labels, message):
    with pytest.raises(InputError, match=message):
        RunRecord.from_arrays(probs, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, list])
def test_labels_may_be_any_integers(dtype):
    labels = LABELS.tolist() if dtype is list else LABELS.astype(dtype)
    record = RunRecord.from_arrays(PROBS, labels)
    np.testing.assert_array_equal(record.labels, LABELS)
    expected = [
        sum(int(np.argmax(p)) == y for p, y in zip(rows, LABELS, strict=True)) / SAMPLES
        for rows in PROBS
    ]
    assert record.accuracy.tolist() == expected
    assert (record.epochs, record.classes, record.half) == (EPOCHS, CLASSES, "all")


@pytest.mark.parametrize("seed", range(4))
def test_halves_are_disjoint_and_cover_all(seed):
    # Each sample's first probability is its number, so that it can be told in a half.
    numbers = np.arange(SAMPLES) / 64
    probs = np.stack([numbers, 1 - numbers, 0 * numbers], axis=1)[None].repeat(2, axis=0)
    record = RunRecord.from_arrays(probs, LABELS)
    val, test = record.split(seed)
    assert (val.half, test.half) == ("val", "test")
    seen = [(half.probs[:, :, 0] * 64).round().astype(int) for half in (val, test)]
    assert sorted([*seen[0][0], *seen[1][0]]) == list(range(SAMPLES))
    assert len(seen[0][0]) == len(seen[1][0]) == SAMPLES // 2
    for half, index in zip((val, test), seen, strict=True):
        np.testing.assert_array_equal(index[0], index[1])
        np.testing.assert_array_equal(half.labels, LABELS[index[0]])
        np.testing.assert_array_equal(half.predicted, record.predicted[:, index[0]])
        with pytest.raises(InputError, match=f"is a {half.half} half already"):
            half.split(seed)
    assert_equal(record.split(seed)[0], val)
    assert record.split(seed + 1)[0].labels.tolist() != val.labels.tolist()
    light = dataclasses.replace(record, probs=None)
    np.testing.assert_array_equal(light.split(seed)[0].labels, val.labels)


def test_a_validation_half_without_a_class_is_refused():
    labels = np.zeros(SAMPLES, int)
    labels[7] = 2  # a class with one sample is in one half alone
    record = RunRecord.from_arrays(PROBS, labels)
    outcomes = set()
    for seed in range(20):
        try:
            outcomes.add(2 in record.split(seed)[0].labels)
        except InputError as error:
            outcomes.add(str(error).replace(f"split {seed}", "the split"))
    refused = "the validation half of the split has no sample of class 2; record more samples"
    assert outcomes == {True, f"{refused} or use another split seed"}


@pytest.mark.parametrize("epochs", [[1, 4], [4, 1], np.array([4, 1]), [4, 1, 4]])
def test_keep_keeps_the_order_of_the_epochs(epochs):
    lighter = RunRecord.from_arrays(PROBS, LABELS).keep(epochs)
    assert lighter.kept.tolist() == [1, 4]
    np.testing.assert_array_equal(lighter.probs, PROBS[[1, 4]])
    assert lighter.epochs == EPOCHS
    np.testing.assert_array_equal(lighter.keep([4]).probs, PROBS[[4]])
    with pytest.raises(InputError, match=r"epoch 2 is not kept; kept are \[1, 4\]"):
        lighter.keep([4, 2, 3])
    with pytest.raises(InputError, match="holds no probabilities"):
        dataclasses.replace(lighter, probs=None).keep([1])


def test_a_write_that_fails_keeps_the_old_file(record, tmp_path):
    path = tmp_path / "record.npz"
    record.save(path)
    with full_disk(100), pytest.raises(OSError, match="too large"):
        dataclasses.replace(record, half="val").save(path)
    assert_equal(RunRecord.load(path), record)
    assert list(tmp_path.iterdir()) == [path]


def test_every_committed_record_loads_and_has_the_name_of_its_run():
    results = Path(__file__).parents[1] / "results"
    paths = [*results.glob("reference/*.npz"), *results.glob("*/records/*.npz")]
    assert len(paths) >= 314
    for path in paths:
        assert RunRecord.load(path).config.id == path.stem


def rewritten(path, target, **changes):
    """A copy of a record's file as another version would have written it."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays["about"]))
    about["config"] |= changes.pop("config", {})
    arrays["about"] = np.array(json.dumps(about | changes))
    np.savez(target, **arrays)
    return target


def test_a_record_of_another_version_loads_or_names_the_version_and_the_field(tmp_path):
    config = RunConfig(noise="symmetric", noise_rate=0.2, student=StudentConfig(teacher="kf"))
    record = dataclasses.replace(
        RunRecord.from_arrays(np.full((1, 2, 2), 0.5), [0, 1]), config=config
    )
    record.save(tmp_path / "now.npz")
    assert RunRecord.load(tmp_path / "now.npz").config == config
    # Before 0.2 every field was written, a student's and those that are gone since among them.
    old = {"student": None, "teacher": "kf", "temperature": 2.0, "mixup": 0.0, "epochs": 40}
    before = rewritten(tmp_path / "now.npz", tmp_path / "old.npz", config=old)
    assert RunRecord.load(before).config == config
    mixed = rewritten(tmp_path / "now.npz", tmp_path / "mixed.npz", config={"mixup": 0.2})
    with pytest.raises(
        InputError, match=r"by fmnlib 0\.2\.0, this is .*: a run has no setting 'mixup'"
    ):
        RunRecord.load(mixed)
    later = {"version": "9.0", "config": {"shape": 3}}
    newer = rewritten(tmp_path / "now.npz", tmp_path / "new.npz", **later)
    with pytest.raises(
        InputError, match=r"by fmnlib 9\.0, this is .*: a run has no setting 'shape'"
    ):
        RunRecord.load(newer)


def test_a_part_knows_which_samples_of_the_whole_it_holds():
    record = RunRecord.from_arrays(PROBS.astype(np.float64), LABELS)
    val, test = record.split(0)
    assert sorted([*val.index, *test.index]) == list(range(SAMPLES))
    np.testing.assert_array_equal(record.labels[val.index], val.labels)
    part = val.take(np.array([5, 2]), "val")  # as the folds of a diagnosis are
    np.testing.assert_array_equal(part.index, val.index[[5, 2]])
    np.testing.assert_array_equal(record.predicted[:, part.index], part.predicted)
