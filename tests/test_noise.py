"""fmnlib.noise: exact counts, expected frequencies, and that the seed decides."""

import numpy as np
import pytest
from scipy import stats

from fmnlib import InputError, RunConfig, RunRecord
from fmnlib.noise import asymmetric, estimated_matrix, noisy_labels, symmetric, transition
from fmnlib.training import train

CLASSES = 7
LABELS = np.random.default_rng(0).integers(0, CLASSES, 5003)
MATRIX = np.random.default_rng(1).dirichlet(np.full(CLASSES, 0.5), CLASSES)
MATRIX[0] = np.eye(CLASSES)[3]
MATRIX[1] = [0, 0.5, 0, 0, 0, 0.5, 0]

DRAWS = [
    lambda seed: symmetric(LABELS, CLASSES, 0.4, seed),
    lambda seed: asymmetric(LABELS, {0: 1, 3: 2}, 0.4, seed),
    lambda seed: transition(LABELS, MATRIX, seed),
]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.999])
def test_symmetric_flips_the_exact_number_never_to_itself(rate):
    noisy, flipped = symmetric(LABELS, CLASSES, rate, seed=3)
    assert flipped.sum() == (noisy != LABELS).sum() == round(rate * len(LABELS))
    assert ((noisy >= 0) & (noisy < CLASSES)).all()


def test_symmetric_is_uniform_over_samples_and_other_classes():
    noisy, flipped = symmetric(LABELS, CLASSES, 0.4, seed=0)
    shift = (noisy - LABELS)[flipped] % CLASSES
    assert stats.chisquare(np.bincount(shift, minlength=CLASSES)[1:]).pvalue > 0.001
    where = np.bincount(np.flatnonzero(flipped) * 10 // len(LABELS), minlength=10)
    assert stats.chisquare(where).pvalue > 0.001


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.45])
def test_asymmetric_flips_the_exact_number_of_each_class_to_its_target(rate):
    confused_with = {0: 1, 1: 0, 4: 5}  # two in a circle: no label flips twice
    noisy, flipped = asymmetric(LABELS, confused_with, rate, seed=3)
    np.testing.assert_array_equal(flipped, noisy != LABELS)
    for label in range(CLASSES):
        members = LABELS == label
        expected = round(rate * members.sum()) if label in confused_with else 0
        assert flipped[members].sum() == expected
        assert (noisy[members & flipped] == confused_with.get(label)).all()


def test_asymmetric_is_uniform_over_samples_and_blind_to_the_order_of_the_mapping():
    noisy, flipped = asymmetric(LABELS, {0: 1, 3: 2}, 0.4, seed=0)
    where = np.flatnonzero(flipped[LABELS == 0]) * 10 // (LABELS == 0).sum()
    assert stats.chisquare(np.bincount(where, minlength=10)).pvalue > 0.001
    np.testing.assert_array_equal(asymmetric(LABELS, {3: 2, 0: 1}, 0.4, seed=0)[0], noisy)


@pytest.mark.parametrize("seed", range(3))
def test_transition_has_the_frequencies_of_its_matrix(seed):
    noisy, flipped = transition(LABELS, MATRIX, seed)
    np.testing.assert_array_equal(flipped, noisy != LABELS)
    for label, row in enumerate(MATRIX):
        size = (LABELS == label).sum()
        share = np.bincount(noisy[LABELS == label], minlength=CLASSES) / size
        assert (share[row == 0] == 0).all()
        assert (abs(share - row) <= 4.5 * np.sqrt(row * (1 - row) / size)).all()


@pytest.mark.parametrize("draw", DRAWS)
def test_the_seed_decides(draw):
    before = LABELS.copy()
    np.testing.assert_array_equal(draw(5)[0], draw(5)[0])
    assert (draw(5)[0] != draw(6)[0]).any()
    np.testing.assert_array_equal(LABELS, before)


def test_human_labels_are_taken_when_their_order_is_the_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("FMN_DATA", str(tmp_path))
    (tmp_path / "cifar100n").mkdir()
    given = symmetric(LABELS, CLASSES, 0.3, seed=0)[0]
    file = tmp_path / "cifar100n" / "cifar100n_human.npz"
    np.savez(file, clean_label=LABELS, noisy_label=given)
    config, some = RunConfig(dataset="cifar100", noise="human"), np.arange(0, len(LABELS), 3)
    noisy, flipped = noisy_labels(config, LABELS, some, CLASSES)
    np.testing.assert_array_equal(noisy, given[some])
    np.testing.assert_array_equal(flipped, (given != LABELS)[some])
    with pytest.raises(InputError, match="not the data set's, in its order"):
        noisy_labels(config, LABELS[::-1].copy(), some, CLASSES)


@pytest.mark.parametrize("rate", [-0.1, 1.0, np.nan])
def test_rates_outside_0_to_1_are_refused(rate):
    with pytest.raises(InputError, match=f"noise rate is {rate}; allowed is at least 0"):
        symmetric(LABELS, CLASSES, rate, seed=0)
    with pytest.raises(InputError, match=f"noise rate is {rate}; allowed is at least 0"):
        asymmetric(LABELS, {0: 1}, rate, seed=0)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.full((CLASSES, CLASSES), 0.1), "does not sum to 1"),
        (np.eye(CLASSES) * 2 - np.roll(np.eye(CLASSES), 1, axis=1), "is negative"),
        (np.full((CLASSES, CLASSES), np.nan), "does not sum to 1"),
        (np.eye(CLASSES - 1), "has 6 classes, the labels run to 6"),
    ],
)
def test_matrices_that_are_none_are_refused(matrix, message):
    with pytest.raises(InputError, match=message):
        transition(LABELS, matrix, seed=0)


def test_the_estimated_matrix_is_the_mean_prediction_of_each_class_at_the_end():
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.ones(3), (2, 40))
    labels = rng.integers(0, 3, 40)
    record = RunRecord.from_arrays(probs, labels)
    val, test = record.split(0)
    by_hand = np.zeros((3, 3))
    for i in range(3):
        members = [k for k in range(len(val.labels)) if val.labels[k] == i]
        for j in range(3):
            by_hand[i, j] = sum(val.probs[-1][k, j] for k in members) / len(members)
    np.testing.assert_allclose(estimated_matrix(val), by_hand, atol=1e-3)
    with pytest.raises(InputError, match="this is a test half: nothing may be estimated"):
        estimated_matrix(test)
    with pytest.raises(InputError, match="class 1 has no sample in the validation half; its row"):
        estimated_matrix(RunRecord.from_arrays(probs[:, :2], np.array([0, 2])))


def test_a_network_that_has_not_memorised_shows_the_noise_that_it_was_trained_with(tmp_path):
    config = RunConfig(loss="cross_entropy", noise="asymmetric", noise_rate=0.4, model="mlp",
                       epochs=8, lr=0.02)  # fmt: skip
    val, _ = train(config, tmp_path, device="cpu", progress=False).split(0)
    matrix = estimated_matrix(val)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-9)
    for source, target in {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}.items():
        assert np.argsort(matrix[source])[-2:].tolist() in ([source, target], [target, source])
        assert matrix[source, target] == pytest.approx(0.4, abs=0.15)
    for clean in (0, 1, 4, 8, 9):
        assert matrix[clean, clean] > 0.75
