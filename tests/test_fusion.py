"""fmnlib.fusion: the searches against plain loops, the weights against Algorithm 1."""

import dataclasses
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest

from fmnlib import InputError, RunRecord
from fmnlib.fusion import (
    Fusion,
    accuracy,
    around,
    best_epochs,
    early_stopping,
    early_stopping_window,
    exhaustive_fusion,
    fixed_jumps,
    fuse,
    horizontal,
    knowledge_fusion,
    single,
    uniform,
)
from fmnlib.scores import forget_fraction

GRID = np.arange(0, 1.005, 0.01)
SEARCHES = {
    "exact": knowledge_fusion,
    "grid": lambda val, **options: knowledge_fusion(val, grid=GRID, **options),
    "exhaustive": exhaustive_fusion,
}


def make(kind, seed, epochs=7, samples=20, classes=4):
    """A random record that leans to its labels; every other one lacks one epoch."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    mean = (np.eye(classes)[labels] + 2) / (classes * 2 + 1)
    if kind == "coarse":  # eighths, full of exact ties
        probs = rng.multinomial(8, mean, (epochs, samples)) / 8
    else:
        probs = rng.gamma(2 * mean, size=(epochs, samples, classes))
        probs /= probs.sum(axis=2, keepdims=True)
    record = RunRecord.from_arrays(probs, labels)
    if kind == "half":
        record = dataclasses.replace(record, probs=probs.astype(np.float16))
    early = rng.permutation(epochs - 1)[: epochs - 1 - seed % 2]
    return record.keep(np.append(early, epochs - 1))


# Knowledge Fusion in plain loops: probabilities are lists [samples][classes].


def argmax(values):
    return values.index(max(values))


def window_mean(probs, row, window):
    members = probs[max(0, row - window) : row + window + 1]
    return [
        [reduce(add, values) / len(members) for values in zip(*rows, strict=True)]
        for rows in zip(*members, strict=True)
    ]


def mix_sample(q, p, share):
    return [(1 - share) * a + share * b for a, b in zip(q, p, strict=True)]


def mix(fused, candidate, share):
    return [mix_sample(q, p, share) for q, p in zip(fused, candidate, strict=True)]


def count_right(fused, labels):
    return sum(argmax(p) == y for p, y in zip(fused, labels, strict=True))


def gaps(ends):
    """The intervals between neighbouring ends; those made by rounding alone are none."""
    return [(a, b) for a, b in pairwise(sorted({0.0, 1.0, *ends})) if b - a > 1e-12]


def ends_of_sample(q, p, label):
    """Where a sample begins and ceases to be right, by trying the middle of each gap."""
    before = [q[label] - other for other in q]
    after = [p[label] - other for other in p]
    crossings = [a / (a - b) for a, b in zip(before, after, strict=True) if a != b]
    tried = gaps(share for share in crossings if 0 < share < 1)
    right = [(a, b) for a, b in tried if argmax(mix_sample(q, p, (a + b) / 2)) == label]
    return [right[0][0], right[-1][1]] if right else []


def best_exact(fused, candidate, labels):
    """Right samples, width and middle of the widest of the best plateaus, the first at a tie."""
    best = (-1, 0.0, 0.0)
    samples = list(zip(fused, candidate, labels, strict=True))
    for a, b in gaps(end for sample in samples for end in ends_of_sample(*sample)):
        right = count_right(mix(fused, candidate, (a + b) / 2), labels)
        if (right, b - a) > best[:2]:
            best = (right, b - a, (a + b) / 2)
    return best


def best_on_grid(fused, candidate, labels):
    return GRID[argmax([count_right(mix(fused, candidate, s), labels) for s in GRID.tolist()])]


def propose(search, record, probs, fused, labels, window):
    if search == "exhaustive":
        tried = [
            best_exact(fused, window_mean(probs, r, window), labels) for r in range(len(probs))
        ]
        row = argmax([found[:2] for found in tried])
        return row, tried[row][2]
    final = [argmax(p) == y for p, y in zip(fused, labels, strict=True)]
    forgotten = [
        sum(c == y and not ok for c, y, ok in zip(record.predicted[e], labels, final, strict=True))
        for e in record.kept
    ]
    row = argmax(forgotten)
    candidate = window_mean(probs, row, window)
    if search == "grid":
        return row, best_on_grid(fused, candidate, labels)
    return row, best_exact(fused, candidate, labels)[2]


def plain_search(search, record, window):
    """Algorithm 1: the picks, and the probabilities of the nested mix."""
    probs = record.probs.astype(np.float64).tolist()
    labels = record.labels.tolist()
    fused, picks = probs[-1], ()
    while True:
        row, share = propose(search, record, probs, fused, labels, window)
        mixed = mix(fused, window_mean(probs, row, window), share)
        if count_right(mixed, labels) <= count_right(fused, labels):
            return picks, fused
        fused, picks = mixed, (*picks, (int(record.kept[row]), float(share)))


@pytest.mark.parametrize("kind", ["fine", "coarse", "half"])
@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("search", SEARCHES)
def test_search_equals_plain_loops(search, window, kind):
    lengths = set()
    for seed in range(12):
        record = make(kind, seed)
        picks, nested = plain_search(search, record, window)
        found = SEARCHES[search](record, window=window)
        assert found.picks == picks
        assert found.window == window
        np.testing.assert_allclose(fuse(record, found), nested, rtol=0, atol=1e-12)
        assert SEARCHES[search](record, window=window, max_picks=1).picks == picks[:1]
        lengths.add(len(picks))
    assert max(lengths) > 1


@pytest.mark.parametrize("search", SEARCHES)
def test_two_epochs_allow_no_window(search):
    record = make("fine", seed=4, epochs=2, samples=80)
    assert SEARCHES[search](record).window == 0
    with pytest.raises(InputError, match="window is 1 with 2 kept epochs; allow 0 to 0"):
        SEARCHES[search](record, window=1)


@pytest.mark.parametrize("search", SEARCHES)
def test_weights_are_algorithm_1_flattened(search):
    record = make("fine", seed=4, epochs=9, samples=80)
    found = SEARCHES[search](record, window=1)
    shares = [share for _, share in found.picks]
    weights = np.zeros(9)
    weights[8] = np.prod([1 - share for share in shares])
    for i, (epoch, share) in enumerate(found.picks):
        members = range(max(0, epoch - 1), min(9, epoch + 2))
        for member in members:
            weights[member] += share * np.prod([1 - s for s in shares[i + 1 :]]) / len(members)
    np.testing.assert_allclose(found.weights, weights, rtol=0, atol=1e-15)
    assert len(shares) > 1
    assert found.weights.min() >= 0
    assert found.weights.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(6))
def test_identities(search, seed):
    record = make("fine", seed, epochs=8, samples=50)
    found = SEARCHES[search](record)
    assert found.window == 1
    assert accuracy(record, found) > accuracy(record, single(record)) == record.accuracy[-1]
    for limit in range(1, len(found.picks) + 1):
        assert SEARCHES[search](record, max_picks=limit).picks == found.picks[:limit]

    order = np.random.default_rng(seed).permutation(4)  # class order[c] is called c now
    probs, labels = record.probs[:, :, order], np.argsort(order)[record.labels]
    predicted = np.argsort(order)[record.predicted]
    renamed = dataclasses.replace(record, probs=probs, labels=labels, predicted=predicted)
    assert SEARCHES[search](renamed).picks == found.picks
    np.testing.assert_array_equal(
        forget_fraction(renamed.correct), forget_fraction(record.correct)
    )

    twice = record.take(np.random.default_rng(seed).permutation(100) % 50, "val")
    assert SEARCHES[search](twice).picks == found.picks


def test_half_precision_is_widened_exactly():
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16)  # every one from 0 to 1
    probs = np.stack([halves, (1 - halves.astype(np.float64)).astype(np.float16)], axis=1)[None]
    record = RunRecord.from_arrays(probs, np.zeros(len(halves), int))
    np.testing.assert_array_equal(fuse(record, single(record)), probs[0].astype(np.float64))


@pytest.mark.parametrize("search", SEARCHES)
def test_nothing_forgotten_leaves_the_final_network(search):
    record = make("fine", seed=1, samples=30)
    perfect = dataclasses.replace(record, labels=record.probs[-1].argmax(axis=1))
    found = SEARCHES[search](perfect)
    assert found.picks == ()
    assert found.weights.tolist() == single(record).weights.tolist() == [0] * 6 + [1]


def test_ties_between_epochs_go_to_the_earliest():
    middle, end = [[0.75, 0.25], [0.25, 0.75]], [[0.25, 0.75], [0.75, 0.25]]
    record = RunRecord.from_arrays(np.array([end, middle, middle, end]), [0, 1])
    for search in SEARCHES.values():
        assert search(record, window=0).picks[0][0] == 1
    assert early_stopping(record).weights.tolist() == [0, 1, 0, 0]


def test_fixed_ensembles():
    record = make("fine", seed=0, epochs=10).keep([0, 2, 4, 6, 8, 9])
    half, third, sixth = 1 / 2, 1 / 3, 1 / 6
    for fusion, weights in [
        (single(record), [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (horizontal(record, 2), [0, 0, 0, 0, 0, 0, 0, 0, half, half]),
        (fixed_jumps(record, 3), [0, 0, third, 0, 0, 0, third, 0, 0, third]),
        (fixed_jumps(record, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (around(record, 4, 0), [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]),
        (around(record, 4, 1), [0, 0, third, 0, third, 0, third, 0, 0, 0]),
        (around(record, 9, 1), [0, 0, 0, 0, 0, 0, 0, 0, half, half]),
        (around(record, 0, 1), [half, 0, half, 0, 0, 0, 0, 0, 0, 0]),
        (uniform(record), [sixth, 0, sixth, 0, sixth, 0, sixth, 0, sixth, sixth]),
    ]:
        assert fusion.weights.tolist() == weights
        assert fusion.networks == np.count_nonzero(weights)
        assert (fusion.picks, fusion.window) == ((), 0)


def test_early_stopping_takes_the_best_kept_epoch():
    probs = np.zeros((4, 5, 2))
    for epoch, right in enumerate([1, 5, 3, 2]):
        probs[epoch, :right, 0] = probs[epoch, right:, 1] = 1
    record = RunRecord.from_arrays(probs, [0] * 5)
    assert early_stopping(record).weights.tolist() == [0, 1, 0, 0]
    assert early_stopping(record.keep([0, 2, 3])).weights.tolist() == [0, 0, 1, 0]
    light = dataclasses.replace(record, probs=None)
    assert early_stopping(light).weights.tolist() == [0, 1, 0, 0]
    with pytest.raises(InputError, match="1 networks of 0 kept epochs"):
        early_stopping(dataclasses.replace(light, kept=np.arange(0)))


def test_fuse_needs_only_what_has_weight():
    record = make("fine", seed=0)
    fusion = around(record, 3, window=0)
    np.testing.assert_array_equal(fuse(record.keep([1, 3]), fusion), record.probs[3])
    with pytest.raises(InputError, match="epoch 3 has weight but no probabilities"):
        fuse(record.keep([1, 6]), fusion)
    with pytest.raises(InputError, match="7 weights for 5 epochs"):
        fuse(make("fine", seed=0, epochs=5), fusion)
    with pytest.raises(InputError, match="holds no probabilities"):
        fuse(dataclasses.replace(record, probs=None), fusion)


def test_save_and_load(tmp_path):
    found = knowledge_fusion(make("fine", seed=2, samples=40), window=2)
    found.save(tmp_path / "fusion.json")
    again = Fusion.load(tmp_path / "fusion.json")
    assert again.weights.tolist() == found.weights.tolist()
    assert (again.picks, again.window, again.networks) == (found.picks, 2, found.networks)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "{}", '{"weights": [1], "picks": [1], "window": 0}'),
        '{"weights": [1.5, -0.5], "picks": [], "window": 0}',
        '{"weights": [0.5, 0.4], "picks": [], "window": 0}',
    ],
)
def test_load_refuses_what_is_no_fusion(tmp_path, content):
    path = tmp_path / "fusion.json"
    with pytest.raises(InputError, match="holds no fusion"):
        Fusion.load(path)
    path.write_text(content)
    with pytest.raises(InputError, match="holds no fusion"):
        Fusion.load(path)
    assert path.read_text() == content


@pytest.mark.parametrize("select", [early_stopping, *SEARCHES.values()])
def test_what_selects_refuses_the_test_half(select):
    record = make("fine", seed=0)
    with pytest.raises(InputError, match="test half"):
        select(record.take(np.arange(5), "test"))
    assert select(record.take(np.arange(5), "val")).weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("search", SEARCHES.values())
def test_searches_refuse(search):
    record = make("fine", seed=0)
    for kept, window, most in [(7, -1, 3), (7, 4, 3), (6, 3, 2)]:
        message = f"window is {window} with {kept} kept epochs; allow 0 to {most}"
        some = record.keep(np.arange(7 - kept, 7))
        with pytest.raises(InputError, match=message):
            search(some, window=window)
        assert search(some, window=most).window == most
    with pytest.raises(InputError, match="max_picks is 0; allow 1 or more"):
        search(record, max_picks=0)
    with pytest.raises(InputError, match="holds no probabilities"):
        search(dataclasses.replace(record, probs=None))
    with pytest.raises(InputError, match=r"epoch 6 is not kept; kept are \[0, 1, 2, 3\]"):
        search(record.keep([0, 1, 2, 3]))


def test_a_search_starts_from_the_final_or_the_best_epoch():
    with pytest.raises(InputError, match='start is \'first\'; choose "final" or "best"'):
        knowledge_fusion(make("fine", seed=0), start="first")
    record = make("fine", seed=0)
    for start, choose in (("final", single), ("best", early_stopping)):
        shares = [share for _, share in knowledge_fusion(record, start=start, max_picks=1).picks]
        weights = knowledge_fusion(record, start=start, max_picks=1).weights
        first = choose(record).weights.argmax()
        assert weights[first] >= 1 - sum(shares)


@pytest.mark.parametrize("grid", [[], [0.5, 1.01], [-0.01, 0.5], [np.nan]])
def test_grid_outside_0_to_1_is_refused(grid):
    with pytest.raises(InputError, match="give shares from 0 to 1"):
        knowledge_fusion(make("fine", seed=0), grid=np.array(grid))
    found = knowledge_fusion(make("fine", seed=1, samples=50), grid=np.array([0.5]))
    assert {share for _, share in found.picks} == {0.5}


@pytest.mark.parametrize("networks", [0, 8])
@pytest.mark.parametrize("ensemble", [horizontal, fixed_jumps])
def test_fixed_ensembles_refuse(ensemble, networks):
    record = make("fine", seed=0)
    with pytest.raises(InputError, match=f"{networks} networks of 7 kept epochs; allow 1 to 7"):
        ensemble(record, networks)
    assert ensemble(record, 7).weights.tolist() == uniform(record).weights.tolist()


@pytest.mark.parametrize("epoch", [-1, 2, 7])
def test_an_epoch_that_is_not_kept_is_refused(epoch):
    record = make("fine", seed=0).keep([0, 6])
    with pytest.raises(InputError, match=rf"epoch {epoch} is not kept; kept are \[0, 6\]"):
        around(record, epoch, 1)


def test_the_window_of_early_stopping_stays_inside_the_run():
    rng = np.random.default_rng(0)
    for best in range(8):
        probs = rng.dirichlet(np.ones(3), size=(8, 30))
        labels = probs[best].argmax(axis=1)
        val = RunRecord.from_arrays(probs, labels)
        for networks in (1, 2, 3, 8):
            weights = early_stopping_window(val, networks).weights
            chosen = np.flatnonzero(weights)
            assert len(chosen) == networks
            assert chosen[-1] - chosen[0] == networks - 1
            assert best in chosen
            assert weights[chosen].tolist() == [1 / networks] * networks


def test_the_best_epochs_are_those_of_highest_validation_accuracy():
    probs = np.random.default_rng(1).dirichlet(np.ones(3), size=(9, 40))
    val = RunRecord.from_arrays(probs, np.zeros(40, int))
    chosen = np.flatnonzero(best_epochs(val, 4).weights)
    assert val.accuracy[chosen].min() >= np.delete(val.accuracy, chosen).max()
    with pytest.raises(InputError, match="test half"):
        best_epochs(val.split(0)[1], 2)
    with pytest.raises(InputError, match="10 networks of 9 kept epochs; allow 1 to 9"):
        best_epochs(val, 10)


@pytest.mark.parametrize("search", SEARCHES.values())
def test_of_equal_epochs_the_earliest_is_mixed_in(search):
    probs = np.array([[[0.9, 0.1]] * 4] * 3 + [[[0.4, 0.6]] * 4])
    found = search(RunRecord.from_arrays(probs, [0] * 4), window=0)
    assert [epoch for epoch, _ in found.picks] == [0]
