"""fmnlib.fusion: greedy selection against plain loops, EM against scipy's optimum."""

import numpy as np
import pytest
from scipy.optimize import minimize

from fmnlib import InputError, RunRecord, fusion
from fmnlib.fusion import em_step, fuse, greedy_selection, likelihood_weights


def make(seed, epochs=6, samples=25, classes=3):
    """A random record that leans to its labels; coarse ones are full of ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    mean = (np.eye(classes)[labels] + 0.7) / (1 + 0.7 * classes)
    if seed % 2:
        return RunRecord.from_arrays(rng.multinomial(8, mean, (epochs, samples)) / 8, labels)
    probs = rng.gamma(2 * mean, size=(epochs, samples, classes))
    return RunRecord.from_arrays(probs / probs.sum(axis=2, keepdims=True), labels)


def plain_greedy(probs, labels, size):
    """Caruana's selection in plain loops: the counts of the best of the nested ensembles."""

    def right(members):
        total = 0
        for n, label in enumerate(labels):
            summed = [sum(probs[e][n][c] for e in members) for c in range(len(probs[0][n]))]
            total += summed.index(max(summed)) == label
        return total

    chosen, best = [], (-1, [])
    for _ in range(size):
        tried = [right([*chosen, e]) for e in range(len(probs))]
        chosen = [*chosen, tried.index(max(tried))]
        if max(tried) > best[0]:
            best = (max(tried), chosen)
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [1, 4, 9])
def test_greedy_selection_against_plain_loops(seed, size):
    record = make(seed)
    found = greedy_selection(record, size)
    right, chosen = plain_greedy(record.probs.tolist(), record.labels.tolist(), size)
    counts = [chosen.count(epoch) / len(chosen) for epoch in range(record.epochs)]
    np.testing.assert_array_equal(found.weights, counts)
    assert (fuse(record, found).argmax(axis=1) == record.labels).sum() == right


def test_greedy_selection_of_one_is_the_best_network_and_more_is_never_worse():
    record = make(4)
    right = [
        (fuse(record, greedy_selection(record, size)).argmax(axis=1) == record.labels).sum()
        for size in (1, 2, 4, 8)
    ]
    assert right[0] == record.correct.sum(axis=1).max()
    assert right == sorted(right)
    assert right[-1] > right[0]


def test_greedy_selection_adds_a_network_again():
    # With one of epoch 1, only four of epoch 0 win the second sample without losing the first:
    # 0.15 + 0.6 k > 0.85 + 0.4 k asks for k > 3.5.
    mild, sure = [[0.45, 0.55], [0.4, 0.6]], [[0.9, 0.1], [0.85, 0.15]]
    record = RunRecord.from_arrays(np.array([mild, sure]), [0, 1])
    assert greedy_selection(record, 8).weights.tolist() == [0.8, 0.2]
    assert greedy_selection(record, 4).weights.tolist() == [1, 0]


def log_likelihood(weights, likelihood):
    return np.log(weights @ likelihood).mean()


@pytest.mark.parametrize("seed", range(6))
def test_every_step_of_em_raises_the_likelihood_and_bounds_what_is_left(seed):
    likelihood = np.random.default_rng(seed).uniform(0.05, 1, (5, 30))
    steps, weights = [], np.full(5, 0.2)
    for _ in range(300):
        after, left = em_step(weights, likelihood)
        assert after.sum() == pytest.approx(1, abs=1e-12)
        steps.append((log_likelihood(weights, likelihood), left))
        weights = after
    reached = np.array([value for value, _ in steps])
    assert (np.diff(reached) > -1e-14).all()
    assert reached[5] > reached[0]
    optimum = -best_by_scipy(likelihood).fun
    for value, left in steps:
        assert value <= optimum + 1e-7
        assert optimum <= value + left + 1e-7
    assert optimum == pytest.approx(reached[-1], abs=1e-3)


def best_by_scipy(likelihood):
    parts = len(likelihood)
    return minimize(
        lambda w: -np.log(w @ likelihood).mean(),
        np.full(parts, 1 / parts),
        jac=lambda w: -(likelihood / (w @ likelihood)).mean(axis=1),
        bounds=[(0, 1)] * parts,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_likelihood_weights_against_scipy(seed, monkeypatch):
    record = make(seed, epochs=4, samples=60)
    likelihood = record.probs[:, np.arange(60), record.labels]
    best = best_by_scipy(likelihood)
    coarse = likelihood_weights(record).weights
    assert log_likelihood(coarse, likelihood) >= -best.fun - 0.0011
    monkeypatch.setattr(fusion, "_TOLERANCE", 1e-7)
    found = likelihood_weights(record).weights
    np.testing.assert_allclose(found, best.x, atol=2e-3)
    assert log_likelihood(found, likelihood) == pytest.approx(-best.fun, abs=1e-6)


def test_likelihood_weights_in_closed_form(monkeypatch):
    # Epoch 0 gives a to m of n labels and 1 - a to the others, epoch 1 the reverse: the mixture
    # gives the m a probability q, and m log q + (n - m) log(1 - q) is largest at q = m / n.
    a, m, n = 0.9, 7, 10
    first = np.where(np.arange(n) < m, a, 1 - a)
    probs = np.stack([[first, 1 - first], [1 - first, first]]).transpose(0, 2, 1)
    monkeypatch.setattr(fusion, "_TOLERANCE", 1e-10)
    weights = likelihood_weights(RunRecord.from_arrays(probs, [0] * n)).weights
    assert weights[0] * a + weights[1] * (1 - a) == pytest.approx(m / n, abs=1e-4)


def test_a_dominated_network_gets_no_weight_and_zeros_are_no_trouble(monkeypatch):
    good = np.full((8, 2), [0.9, 0.1])
    bad = np.full((8, 2), [0.2, 0.8])
    none = np.full((8, 2), [0.0, 1.0])
    record = RunRecord.from_arrays(np.array([bad, good, none]), [0] * 8)
    monkeypatch.setattr(fusion, "_TOLERANCE", 1e-5)
    assert likelihood_weights(record).weights.tolist() == [0, 1, 0]
    hopeless = RunRecord.from_arrays(np.array([none, none]), [0] * 8)
    assert likelihood_weights(hopeless).weights.tolist() == [0.5, 0.5]


def test_weights_stand_at_the_epochs_that_are_kept():
    record = make(2).keep([1, 3, 5])
    for weights in (greedy_selection(record, 5).weights, likelihood_weights(record).weights):
        assert len(weights) == 6
        assert weights[[0, 2, 4]].tolist() == [0, 0, 0]
        assert weights.sum() == pytest.approx(1)


def test_what_selects_refuses_the_test_half_and_bad_numbers():
    val, test = make(0, samples=40).split(0)
    for select in (lambda half: greedy_selection(half, 3), likelihood_weights):
        with pytest.raises(InputError, match="this is a test half"):
            select(test)
    with pytest.raises(InputError, match="size is 0; allow 1 or more"):
        greedy_selection(val, 0)


def test_very_many_equal_epochs_keep_their_weights():
    found = likelihood_weights(RunRecord.from_arrays(np.full((10_001, 1, 2), 0.5), [0]))
    assert found.weights.sum() == pytest.approx(1)
