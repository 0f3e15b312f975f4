"""Ways of choosing, several views, parts of a data set: what the ablations rest on."""

import dataclasses

import numpy as np
import pytest
import torch

from fmnlib import InputError, RunConfig, RunRecord, data, runs
from fmnlib.checkpoint import checkpoint_path, load_tensors
from fmnlib.distillation import load_network, members_of
from fmnlib.fusion import accuracy, early_stopping, fuse, single, uniform
from fmnlib.paper import ablation, features
from fmnlib.paper.features import _half_shifts
from fmnlib.stats import calibration_error, nll

TINY = RunConfig(model="mlp", width=0.2, epochs=2, train_samples=120, eval_samples=200)


def make(seed=0, **noise):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 90)
    probs = rng.dirichlet([1, 1, 1], (5, 90)) / 2 + np.eye(3)[labels] / 6 + 1 / 9
    record = RunRecord.from_arrays(probs, labels)
    config = RunConfig(seed=seed, **noise)
    return dataclasses.replace(record, config=config, provenance={"seconds": 1.5})


def test_scores_are_those_of_the_test_half():
    record = make(3)
    [first, second] = ablation.scored([record], [4], {"a": early_stopping, "b": uniform}, item="x")
    val, test = record.split(4)
    probs = fuse(test, early_stopping(val))
    assert (first.method, first.seed, first.split_seed, first.setting) == (
        "a",
        3,
        4,
        "memorising_clean",
    )
    assert first.accuracy == accuracy(test, early_stopping(val))
    assert first.nll == nll(probs, test.labels)
    assert first.ece == calibration_error(probs, test.labels)
    assert (first.networks, second.networks, second.train_seconds) == (1, 5, 1.5)


def test_what_may_be_chosen_from():
    val, test = make().split(0)
    assert ablation.spaced(val, 5).kept.tolist() == [0, 1, 2, 3, 4]
    assert ablation.early(val, 3).kept.tolist() == [0, 1, 4]
    assert ablation.early(val, 4).kept.tolist() == [0, 1, 2, 4]
    some = ablation.fewer(val, 20)
    shared = [np.flatnonzero((val.probs[0] == row).all(axis=1)) for row in some.probs[0]]
    assert [len(rows) for rows in shared] == [1] * 20
    assert (np.diff(np.concatenate(shared)) > 0).all()
    fusion = uniform(val)
    assert ablation.always(fusion)(some) is fusion
    for change in (ablation.spaced, ablation.early, ablation.fewer):
        with pytest.raises(InputError, match="99"):
            change(val, 99)
    with pytest.raises(InputError, match="test half"):
        ablation.fewer(test, 5)


def test_validation_labels_get_the_noise_of_the_run():
    val, test = make(noise="symmetric", noise_rate=0.4).split(0)
    worse = ablation.mislabelled(val)
    assert (worse.labels != val.labels).sum() == round(0.4 * len(val.labels))
    np.testing.assert_array_equal(worse.predicted, val.predicted)
    half = {"classes": "first_half"}  # whose classes are taken for the next ones
    val, _ = make(noise="asymmetric", noise_rate=0.5, **half).split(0)
    flipped = ablation.mislabelled(val)
    changed = flipped.labels != val.labels
    for label in range(3):
        assert changed[val.labels == label].sum() == round(0.5 * (val.labels == label).sum())
    np.testing.assert_array_equal(flipped.labels[changed], (val.labels[changed] + 1) % 3)
    clean = make().split(0)[0]
    np.testing.assert_array_equal(ablation.mislabelled(clean).labels, clean.labels)
    with pytest.raises(InputError, match="test half"):
        ablation.mislabelled(test)
    with pytest.raises(InputError, match="noise is matrix:m.csv"):
        ablation.mislabelled(make(noise="matrix:m.csv").split(0)[0])
    with pytest.raises(InputError, match="no config"):
        ablation.mislabelled(dataclasses.replace(val, config=None))


def test_share_accuracy_against_mixing():
    record = make(1)
    shares = np.linspace(0.01, 0.99, 50)
    final, window = record.probs[-1], record.probs[1:4].mean(axis=0)
    mixed = [((1 - s) * final + s * window).argmax(axis=1) == record.labels for s in shares]
    accuracies = ablation.share_accuracy(record, 2, 1, shares)
    np.testing.assert_allclose(accuracies, np.mean(mixed, axis=1))
    assert len(set(accuracies)) > 3


def test_class_accuracy_against_counting():
    record = make(5)
    halves = [record.split(split)[1] for split in (0, 1)]
    for label, accuracy_of_class in enumerate(ablation.class_accuracy([record], [0, 1], single)):
        each = [half.correct[-1][half.labels == label].mean() for half in halves]
        assert accuracy_of_class == pytest.approx(np.mean(each))


def test_half_shifts_by_hand():
    image = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
    same, up, down, left, right = (view[0, 0] for view in _half_shifts(image))
    np.testing.assert_array_equal(same, image[0, 0])
    np.testing.assert_array_equal(up[0], (same[0] + same[1]) / 2)
    np.testing.assert_array_equal(up[2], same[2] / 2)
    np.testing.assert_array_equal(down[0], same[0] / 2)
    np.testing.assert_array_equal(down[2], (same[2] + same[1]) / 2)
    np.testing.assert_array_equal(left[:, 1], (same[:, 1] + same[:, 2]) / 2)
    np.testing.assert_array_equal(right[:, 1], (same[:, 1] + same[:, 0]) / 2)


def test_views_are_averaged_as_probabilities():
    [record] = runs.obtain([TINY], progress=False)
    fusion = uniform(record)
    [seen] = runs.obtain([features.viewed(TINY, "uniform", fusion)], progress=False)
    images = data.load(TINY)
    members = members_of(TINY, runs.folder(TINY), fusion)
    nets = [load_network(member, images) for member in members]
    expected = [
        net(images.normalize(view)).softmax(1).detach().numpy()
        for net in nets
        for view in _half_shifts(images.eval_images)
    ]
    np.testing.assert_allclose(seen.probs[0], np.mean(expected, axis=0), atol=1e-3)
    assert seen.epochs == 1
    [again] = runs.obtain([features.viewed(TINY, "uniform", fusion)], progress=False)
    np.testing.assert_array_equal(again.probs, seen.probs)


def test_a_transferred_run_starts_where_its_source_ended():
    source = dataclasses.replace(TINY, classes="first_half")
    target = dataclasses.replace(TINY, classes="second_half", lr=0.0, weight_decay=0.0)
    job = features.transferred(target, source)
    [record] = runs.obtain([job], progress=False)
    assert record.kept.tolist() == [0, 1]
    assert record.classes == 5
    start = load_tensors(checkpoint_path(runs.folder(source), 1))
    end = load_tensors(checkpoint_path(runs.folder(job.config), 1))
    for name, tensor in start.items():
        if tensor.is_floating_point() and "running" not in name:
            assert torch.equal(tensor, end[name]), name


def test_a_part_of_the_classes_is_counted_from_zero():
    whole = data.load(RunConfig())
    part = data.load(RunConfig(classes="second_half"))
    wanted = whole.labels >= 5
    assert part.classes == 5
    assert torch.equal(part.labels, whole.labels[wanted] - 5)
    assert torch.equal(part.images, whole.images[wanted])
    assert torch.equal(part.eval_labels, whole.eval_labels[whole.eval_labels >= 5] - 5)


def test_held_out_images_have_the_labels_that_they_would_be_trained_on():
    noisy = RunConfig(noise="symmetric", noise_rate=0.4)
    whole = data.load(noisy)
    part = data.load(dataclasses.replace(noisy, evaluate="heldout", train_samples=800))
    assert (len(part.labels), len(part.eval_labels)) == (800, 200)

    def rows(images, labels):
        return sorted((*image.flatten().tolist(), y) for image, y in zip(images, labels.tolist()))

    both = torch.cat([part.images, part.eval_images]), torch.cat([part.labels, part.eval_labels])
    assert rows(*both) == rows(whole.images, whole.labels)
    assert part.flipped.sum() < whole.flipped.sum() == 400
    with pytest.raises(InputError, match="no training image is held out"):
        data.load(RunConfig(evaluate="heldout"))


def test_without_splits_each_run_has_the_one_of_its_training_seed():
    record = make(3)
    [own] = ablation.scored([record], [], {"a": uniform}, item="x")
    [same] = ablation.scored([record], [3], {"a": uniform}, item="x")
    assert record.config.seed == 3
    assert own == same


def test_a_half_without_a_class_leaves_the_others_their_mean():
    labels = np.array([0] * 10 + [1])
    record = RunRecord.from_arrays(np.tile(np.eye(2)[labels], (2, 1, 1)), labels)
    assert ablation.class_accuracy([record], [0, 1, 2, 3], single).tolist() == [1, 1]
