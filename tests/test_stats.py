import dataclasses

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fmnlib import InputError, RunConfig, RunRecord
from fmnlib.fusion import best_epochs
from fmnlib.record import Result
from fmnlib.stats import (
    MARGIN,
    calibration_error,
    costs,
    differences,
    gains,
    interval,
    mean_sem,
    nll,
    outcome,
    paired_difference,
    percent,
    points,
    score,
    summarize,
    table,
    verdict,
)

SCORE = Result(
    item="label_noise",
    setting="sym40",
    method="kf",
    seed=0,
    split_seed=0,
    accuracy=0.5,
    nll=1.0,
    ece=0.1,
    networks=4,
    train_seconds=2.0,
)


def scores(method, accuracy):
    """One result for each row (seed) and column (split) of an array of accuracies."""
    return [
        dataclasses.replace(SCORE, method=method, seed=seed, split_seed=split, accuracy=value)
        for seed, row in enumerate(accuracy)
        for split, value in enumerate(row)
    ]


def test_standard_error_by_hand():
    mean, sem = mean_sem([1.0, 2.0, 6.0])
    assert mean == 3
    assert sem == pytest.approx(np.sqrt(7 / 3))  # deviation sqrt((4 + 1 + 9) / 2), over sqrt(3)
    assert np.isnan(mean_sem([1.0])[1])


def test_the_replicate_is_the_seed():
    accuracy = [[0.5, 0.7], [0.8, 0.8]]
    summary = summarize(scores("kf", accuracy))
    assert summary["sym40"]["kf"] == {"mean": 70.0, "sem": 10.0, "n": 2, "seeds": [60.0, 80.0]}


def test_paired_difference_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    kf, single = rng.random((5, 3)), rng.random((5, 3))
    results = scores("kf", kf) + scores("single", single)
    rng.shuffle(results)
    mean, low, high = paired_difference(results, "sym40", "kf", "single")
    paired = scipy_stats.ttest_rel(kf.mean(axis=1), single.mean(axis=1))
    interval = paired.confidence_interval(0.95)
    assert mean == pytest.approx(100 * (kf - single).mean())
    assert (low, high) == pytest.approx((100 * interval.low, 100 * interval.high))


def test_what_is_not_paired_is_refused():
    results = scores("kf", [[0.5, 0.6]]) + scores("single", [[0.5]])
    with pytest.raises(InputError, match="kf and single are not paired in sym40"):
        paired_difference(results, "sym40", "kf", "single")
    with pytest.raises(InputError, match="not paired in sym40"):
        paired_difference(results, "sym40", "kf", "distilled_kf")


def test_an_interval_is_that_of_one_sample():
    values = np.random.default_rng(0).normal(size=6)
    mean, low, high = interval(values)
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((values.mean(), *expected))


def test_numbers_are_rounded_to_four_places_and_read_to_one():
    numbers = percent([1 / 3, 2 / 7, 1 / 11])
    assert numbers["seeds"] == [33.3333, 28.5714, 9.0909]
    values = 100 * np.array([1 / 3, 2 / 7, 1 / 11])
    assert numbers["mean"] == round(values.mean(), 4)
    assert numbers["sem"] == round(values.std(ddof=1) / 3**0.5, 4)
    assert points(-0.04, -1.26, 0.04) == "+0.0 [−1.3, 0.0]"
    assert points(0.06, -1.0, 1.0) == "+0.1 [−1.0, 1.0]"


def test_settings_and_methods_stand_in_the_order_in_which_they_come():
    results = scores("single", [[0.5]]) + scores("kf", [[0.6]])
    results += [dataclasses.replace(r, setting="clean") for r in results]
    summary = summarize(results)
    assert list(summary) == ["sym40", "clean"]
    assert [list(rows) for rows in summary.values()] == [["single", "kf"]] * 2


def test_a_single_seed_has_neither_error_nor_interval():
    results = scores("kf", [[0.5, 0.6]]) + scores("single", [[0.5, 0.5]])
    assert percent([0.55]) == {"mean": 55.0, "sem": None, "n": 1, "seeds": [55.0]}
    assert table(summarize(results)).loc["kf", "40% symmetric"] == "55.0"
    shown = differences(results, [("kf", "single")], {})
    assert shown.loc["kf − single", "40% symmetric"] == "+5.0"
    assert verdict(results, "kf", "single") == "one seed: 40% symmetric"


def test_differences_and_verdicts_go_by_the_intervals():
    kf, single = [[0.9], [0.8], [0.85]], [[0.5], [0.4], [0.46]]
    results = scores("kf", kf) + scores("single", single)
    results += [dataclasses.replace(r, setting="clean", accuracy=0.5) for r in results]
    shown = differences(results, [("single", "kf")], {"kf": "KF"})
    low, high = paired_difference(results, "sym40", "single", "kf")[1:]
    assert shown.index.tolist() == ["single − KF"]
    assert shown.loc["single − KF"].tolist() == [
        f"−39.7 [−{-low:.1f}, −{-high:.1f}]",
        "+0.0 [0.0, 0.0]",
    ]
    assert (
        verdict(results, "kf", "single") == "found: 40% symmetric; equal within 0.5 points: clean"
    )
    assert (
        verdict(results, "single", "kf")
        == "the opposite: 40% symmetric; equal within 0.5 points: clean"
    )


def test_likelihood_and_calibration_by_hand():
    probs = np.array([[0.8, 0.2], [0.6, 0.4], [1.0, 0.0]])
    labels = np.array([0, 1, 1])
    expected = -(np.log(0.8) + np.log(0.4) + np.log(1e-12)) / 3
    assert nll(probs, labels) == pytest.approx(expected)
    # One sample in each bin: gaps of 0.2, 0.6 and 1.
    assert calibration_error(probs, labels) == pytest.approx((0.2 + 0.6 + 1) / 3)


def test_calibration_is_that_of_plain_loops():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(5), size=400)
    labels = rng.integers(0, 5, 400)
    error, bins = 0.0, 7
    for b in range(bins):
        inside = [n for n in range(400) if b / bins <= probs[n].max() < (b + 1) / bins]
        if inside:
            accuracy = np.mean([probs[n].argmax() == labels[n] for n in inside])
            error += len(inside) / 400 * abs(accuracy - np.mean([probs[n].max() for n in inside]))
    assert calibration_error(probs, labels, bins) == pytest.approx(error)


def test_the_highest_confidence_is_in_the_last_bin_of_fifteen():
    top = np.array([1.0, 0.95, 0.9])  # of the last bin, of the last and of the one before
    probs, wrong_at = np.stack([top, 1 - top], axis=1), np.array([1, 0, 0])
    expected = (abs(-1 + 0.05) + 0.1) / 3
    assert calibration_error(probs, wrong_at) == pytest.approx(expected)
    assert calibration_error(probs, wrong_at, 15) == pytest.approx(expected)
    apart = np.array([[0.66, 0.34], [0.68, 0.32]])  # apart in 15 bins, together in 16
    gaps = calibration_error(apart, np.array([0, 1]))
    assert gaps == pytest.approx((0.34 + 0.68) / 2)
    assert calibration_error(apart, np.array([0, 1]), 16) == pytest.approx((0.68 - 0.34) / 2)


def test_a_score_names_its_run_and_rounds_its_seconds():
    test = RunRecord.from_arrays(np.array([[[0.75, 0.25]]]), [0])
    words = {"item": "x", "method": "kf", "split": 3, "networks": 2, "seconds": 1.2367}
    with pytest.raises(InputError, match="no config; give the record of a trained run"):
        score(test.probs[0], test, **words)
    trained = dataclasses.replace(test, config=RunConfig(seed=4))
    result = score(test.probs[0], trained, **words)
    assert (result.seed, result.split_seed, result.networks) == (4, 3, 2)
    assert result.train_seconds == 1.24
    assert result.accuracy == 1


def test_tables_show_mean_error_and_cost():
    results = scores("single", [[0.4], [0.4]]) + scores("kf", [[0.5], [0.7]])
    assert table(summarize(results)).loc["kf", "40% symmetric"] == "60.0 ± 10.0"
    assert costs(results, "sym40").loc["single"].tolist() == [4.0, 2.0]
    assert costs(results, "sym40").index.tolist() == ["single", "kf"]


def test_an_interval_that_ends_at_zero_is_not_clear():
    assert outcome(-1.0, 0.0) == outcome(0.0, 1.0) == "not clear"


def test_an_interval_that_touches_the_margin_is_not_equal():
    assert outcome(-MARGIN, 0.2) == "not clear"
    assert outcome(0.1, MARGIN) == "found"
    assert outcome(-0.49, 0.49) == "equal"


def test_the_final_network_gains_nothing_over_itself():
    rng = np.random.default_rng(0)
    record = RunRecord.from_arrays(rng.dirichlet(np.ones(3), (6, 80)), rng.integers(0, 3, 80))
    val, test = record.split(0)
    rows = gains(val, test, best_epochs(val, 3), {"mine": test.correct[0]})
    assert rows.loc["single", ["gain", "low", "high"]].tolist() == [0, 0, 0]
    assert rows.loc["fused", ["ahead", "accuracy"]].tolist()[0] == 0
    assert rows.loc["mine", "accuracy"] == test.correct[0].mean()
    assert rows.loc["mine", "gain"] == pytest.approx(
        test.correct[0].mean() - test.correct[-1].mean()
    )
