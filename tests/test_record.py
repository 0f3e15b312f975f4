"""fmnlib.record: what is saved is read back, halves, damaged files, arrays from elsewhere."""

import contextlib
import dataclasses
import io
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fmnlib import InputError, RunConfig, RunRecord
from fmnlib import record as record_module
from fmnlib.config import StudentConfig
from fmnlib.record import LOSS_EDGES, Columns, folds

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
    assert {"is damaged or is not a record" in line for line in told} == {True}
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
        (PROBS, LABELS.astype(float), "labels are float64; give integers from 0 to 2"),
        (PROBS, LABELS + 1, "labels run from 1 to 3; allow 0 to 2; they count from 0"),
        (PROBS, LABELS - 1, "labels run from -1 to 1; allow 0 to 2"),
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


def test_a_rare_class_blocks_no_split():
    labels = np.zeros(SAMPLES, int)
    labels[7] = 2  # a class with one sample is in one half alone
    record = RunRecord.from_arrays(PROBS, labels)
    assert {2 in record.split(seed)[0].labels for seed in range(20)} == {True, False}
    with pytest.raises(InputError, match="one sample has no two halves; record more"):
        RunRecord.from_arrays(PROBS[:, :1], [0]).split(0)


def test_with_ids_the_same_samples_are_split_alike_in_any_order(tmp_path):
    ids = np.array([f"{label}/{n}.jpg" for n, label in enumerate(LABELS)])
    record = RunRecord.from_arrays(PROBS, LABELS, ids=ids)
    order = np.random.default_rng(1).permutation(SAMPLES)
    other = RunRecord.from_arrays(PROBS[:, order], LABELS[order], ids=ids[order].tolist())
    for seed in range(3):
        for one, same in zip(record.split(seed), other.split(seed), strict=True):
            assert len(one.ids) == SAMPLES // 2
            assert set(one.ids) == set(same.ids)
            np.testing.assert_array_equal(one.labels, LABELS[np.isin(ids, one.ids)])
            fold_of = [dict(zip(r.ids, folds(r, 5, seed), strict=True)) for r in (one, same)]
            assert fold_of[0] == fold_of[1]
            assert np.bincount([*fold_of[0].values()]).tolist() == [4] * 5
    assert set(record.split(0)[0].ids) != set(record.split(1)[0].ids)
    record.save(tmp_path / "record.npz")
    assert_equal(RunRecord.load(tmp_path), record)
    numbered = RunRecord.from_arrays(PROBS, LABELS, ids=range(SAMPLES))
    texts = RunRecord.from_arrays(PROBS, LABELS, ids=[str(n) for n in range(SAMPLES)])
    np.testing.assert_array_equal(numbered.split(0)[0].index, texts.split(0)[0].index)


def test_no_group_is_divided(tmp_path):
    groups = np.repeat(np.arange(14), [1, 2, 3, 4, 5, 1, 1, 2, 2, 3, 4, 5, 3, 4])
    record = RunRecord.from_arrays(PROBS, LABELS, ids=np.arange(SAMPLES), groups=groups)
    drawn = set()
    for seed in range(10):
        val, test = record.split(seed)
        assert not set(val.groups) & set(test.groups)
        assert abs(len(val.labels) - len(test.labels)) <= 5  # the largest group
        fold_of = folds(record, 5, seed)
        assert all(len(set(fold_of[groups == group])) == 1 for group in groups)
        assert np.ptp(np.bincount(fold_of)) <= 5
        drawn.add(tuple(val.index))
    assert len(drawn) == 10
    record.save(tmp_path / "record.npz")
    assert_equal(RunRecord.load(tmp_path), record)
    with pytest.raises(InputError, match="2 groups do not make 5 parts; record more groups"):
        folds(RunRecord.from_arrays(PROBS, LABELS, groups=np.arange(SAMPLES) % 2), 5, 0)


def test_without_names_the_folds_are_a_permutations():
    drawn = np.random.default_rng(3).permutation(SAMPLES) % 5
    np.testing.assert_array_equal(folds(RunRecord.from_arrays(PROBS, LABELS), 5, 3), drawn)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"ids": [0] * SAMPLES}, "two samples have one id; give .* as groups"),
        ({"ids": [0]}, r"ids are int64 of shape \(1,\); give 40 integers or texts"),
        ({"groups": np.full(SAMPLES, 0.5)}, "groups are float64"),
        ({"groups": [None] * SAMPLES}, "a list is not an array .it holds objects"),
    ],
)
def test_names_that_are_none_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        RunRecord.from_arrays(PROBS, LABELS, **names)


@pytest.mark.parametrize(
    "probs", ["abc", [[1], [1, 2]], None, {"a": 1}, torch.ones(1, 1, 2).to_sparse(), PROBS * 1j]
)
def test_what_is_no_array_is_refused_in_one_line(probs):
    with pytest.raises(InputError) as told:
        RunRecord.from_arrays(probs, LABELS)
    assert len(str(told.value).splitlines()) == 1


def test_tensors_make_a_record_too():
    tensor = torch.tensor(PROBS.astype(np.float32), requires_grad=True)
    record = RunRecord.from_arrays(tensor, torch.tensor(LABELS))
    np.testing.assert_array_equal(record.probs, PROBS)


WHOLE = RunRecord.from_arrays(PROBS, LABELS)
MUTATIONS = [
    ({"labels": LABELS[1:]}, r"labels are of shape \(39,\); give \(40,\)"),
    ({"labels": LABELS + 0.0}, "labels are float64; give integers from 0 to 2"),
    ({"labels": LABELS + 1}, "labels run from 1 to 3; allow 0 to 2; .*give labels - 1"),
    ({"probs": PROBS * np.nan}, "epoch 0 are not finite"),
    ({"probs": PROBS - np.float16([0.5, -0.5, 0])}, "epoch 0 are not finite, negative"),
    ({"probs": PROBS[1:]}, "probs are float16 of shape"),
    ({"probs": PROBS.astype(int)}, "probs are int64 of shape"),
    ({"probs": PROBS[::-1]}, "epoch 0 are not those of its prob.*in the same order"),
    ({"predicted": WHOLE.predicted * 0}, "epoch 0 are not those of its probabilities"),
    ({"predicted": WHOLE.predicted[::-1]}, "epoch 0 are not those of its probabilities"),
    ({"predicted": WHOLE.predicted + 1}, "predicted run from 1 to 3"),
    ({"predicted": WHOLE.predicted[0]}, r"predicted is of shape \(40,\)"),
    ({"predicted": WHOLE.predicted * 1.0}, "predicted are float64"),
    ({"kept": WHOLE.kept[::-1]}, "kept epochs do not ascend"),
    ({"kept": WHOLE.kept + 1}, "kept run from 1 to 6; allow 0 to 5"),
    ({"index": WHOLE.kept}, "index are of shape"),
    ({"ids": np.zeros(SAMPLES, int)}, "two samples have one id"),
    ({"loss_histogram": np.zeros((1, 2, 3), int)}, "loss_histogram is .1, 2, 3.; give a row"),
]
FIELDS = [
    ({"half": "TEST"}, "half is 'TEST'; give .*all, val or test"),
    ({"classes": "ten"}, "classes is 'ten' .*give a whole number from 2 on"),
    ({"classes": 1}, "classes is 1 .*from 2 on"),
    ({"provenance": 3}, "provenance is a int; give a mapping"),
]


@pytest.mark.parametrize(("change", "message"), MUTATIONS + FIELDS)
def test_what_contradicts_itself_is_no_record(tmp_path, change, message):
    bare = object.__new__(RunRecord)  # the tests' own checks of types would be first
    for field in dataclasses.fields(RunRecord):
        object.__setattr__(bare, field.name, change.get(field.name, getattr(WHOLE, field.name)))
    with pytest.raises(InputError, match=message):
        bare.__post_init__()
    # As a file that an older version wrote, which has no digest, it is refused by the same check.
    WHOLE.save(tmp_path / "now.npz")
    arrays = {k: v for k, v in change.items() if isinstance(v, np.ndarray)}
    about = {k: v for k, v in change.items() if k not in arrays}
    rewritten(tmp_path / "now.npz", tmp_path / "old.npz", arrays=arrays, crc={}, **about)
    with pytest.raises(InputError, match="is damaged or is not a record") as told:
        RunRecord.load(tmp_path / "old.npz")
    assert len(str(told.value).splitlines()) == 1


def test_a_digest_holds_what_no_check_can_tell(tmp_path):
    WHOLE.save(tmp_path / "now.npz")
    order = [5, 0, 1, 2, 3, 4]
    changed = {"predicted": WHOLE.predicted[order], "probs": PROBS[order]}
    for arrays in (changed, {"labels": 2 - LABELS}):
        rewritten(tmp_path / "now.npz", tmp_path / "other.npz", arrays=arrays)
        with pytest.raises(InputError, match="an array is not the one that was saved"):
            RunRecord.load(tmp_path / "other.npz")
    rewritten(tmp_path / "now.npz", tmp_path / "same.npz")
    assert_equal(RunRecord.load(tmp_path / "same.npz"), WHOLE)


def test_of_very_many_probabilities_evenly_spaced_samples_are_checked(monkeypatch):
    monkeypatch.setattr(record_module, "_CHECKED", 100)  # as if they were millions
    with pytest.raises(InputError, match="not those of its probabilities"):
        dataclasses.replace(WHOLE, predicted=WHOLE.predicted * 0)
    spoilt = PROBS.copy()
    spoilt[2, 1] = np.nan
    dataclasses.replace(WHOLE, probs=spoilt)
    with pytest.raises(InputError, match="epoch 2 are not finite"):
        RunRecord.from_arrays(spoilt, LABELS)  # looks at all of them


def test_probabilities_are_compressed_where_that_is_asked_for(tmp_path):
    for compress in (False, True):
        WHOLE.save(tmp_path / "record.npz", compress=compress)
        with zipfile.ZipFile(tmp_path / "record.npz") as file:
            kinds = {info.filename: info.compress_type for info in file.infolist()}
        stored = kinds.pop("probs.npy")
        assert stored == (zipfile.ZIP_LZMA if compress else zipfile.ZIP_STORED)
        assert set(kinds.values()) == {zipfile.ZIP_LZMA}
        assert_equal(RunRecord.load(tmp_path), WHOLE)


def test_a_pipe_in_the_place_of_probabilities_is_refused(tmp_path):
    RunRecord.from_arrays(PROBS, LABELS).save(tmp_path / "record.npz", light=True)
    os.mkfifo(tmp_path / "probs.npy")
    with pytest.raises(InputError, match=r"probs\.npy is not a file"):
        RunRecord.load(tmp_path)


def test_a_pipe_is_no_record(tmp_path):
    os.mkfifo(tmp_path / "record.npz")
    with pytest.raises(InputError, match="is not a record .it is not a file"):
        RunRecord.load(tmp_path)


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
    arrays |= changes.pop("arrays", {})
    about = json.loads(str(arrays["about"]))
    if "config" in changes:
        about["config"] |= changes.pop("config")
    elif arrays.keys() - {"about"} != set(about["arrays"]):
        about["arrays"] = [name for name in arrays if name != "about"]
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


def test_a_view_indexes_like_an_array():
    probs, index = np.random.default_rng(0).random((4, 6, 3)), np.array([5, 1, 3])
    view, copy, every = Columns(probs, index), probs[:, index], slice(None)
    keys = 1, every, ..., (..., 1), (0, ..., 1), [0, 2], (every, 0), (every, every, [0, 1])
    for key in (*keys, (0, 1), (2, slice(1, 3)), ([0, 2], every, 1), (every, [0, 1], [2, 0])):
        np.testing.assert_array_equal(np.asarray(view[key]), copy[key])


def test_epochs_to_keep_may_be_a_set():
    record = RunRecord.from_arrays(np.full((3, 2, 2), 0.5), [0, 1])
    assert record.keep({0, 2}).kept.tolist() == [0, 2]


def test_a_numpy_number_of_classes_is_saved(tmp_path):
    code = """
import sys, numpy as np, fmnlib
y = np.array([0, 1])
nothing = {"kept": np.arange(0), "probs": None}
fmnlib.RunRecord(labels=y, predicted=y[None], classes=y.max() + 1, **nothing).save(sys.argv[1])
"""  # in another process, where no type checker comes first
    path = tmp_path / "record.npz"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert RunRecord.load(path).classes == 2
