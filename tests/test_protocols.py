"""Snapshot, FGE, SWA, EMA and students against cases worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fmnlib import InputError, RunConfig, RunRecord, fusion, runs
from fmnlib.checkpoint import checkpoint_path, load_tensors
from fmnlib.data import load
from fmnlib.fusion import knowledge_fusion
from fmnlib.paper.compare import (
    compare_baselines,
    compare_protocols,
    compare_students,
    independent_members,
    replicates,
    student_of_finals,
    training_methods,
    try_losses,
)
from fmnlib.training import build_model, learning_rate

SMALL = RunConfig(noise="symmetric", noise_rate=0.4, train_samples=100, eval_samples=200, epochs=8)


def picked(protocol):
    return np.flatnonzero(protocol[1].weights).tolist()


def test_the_networks_of_each_method():
    forty = training_methods(RunConfig())
    assert picked(forty["snapshot"]) == [7, 15, 23, 31, 39]
    assert picked(forty["fge"]) == picked(forty["swa"]) == [31, 33, 35, 37, 39]
    assert picked(training_methods(RunConfig(), 10)["fge"]) == list(range(30, 40))
    assert picked(forty["ema"]) == [39]
    two_hundred = training_methods(RunConfig(epochs=200))
    assert picked(two_hundred["snapshot"]) == [39, 79, 119, 159, 199]
    assert picked(two_hundred["fge"]) == [159, 169, 179, 189, 199]
    for method in ("snapshot", "fge", "swa"):
        assert forty[method][1].weights[39] == 0.2


@pytest.mark.parametrize("method", ["snapshot", "fge"])
@pytest.mark.parametrize(("epochs", "networks"), [(40, 5), (200, 5), (8, 2), (24, 3)])
def test_networks_are_taken_where_the_rate_is_lowest(method, epochs, networks):
    run = RunConfig(epochs=epochs, lr=1.0)
    config, chosen = training_methods(run, networks)[method]
    end_of = [learning_rate(config, (epoch + 1 - 1e-6) / epochs) for epoch in range(epochs)]
    at_zero = [epoch for epoch, rate in enumerate(end_of) if rate < 1e-4]
    assert at_zero == np.flatnonzero(chosen.weights).tolist()


def test_rates_with_a_tail():
    def rates(schedule, at, **fields):
        config = RunConfig(lr=1.0, schedule=schedule, **fields)
        return [round(learning_rate(config, done), 4) for done in at]

    # Over three quarters along half a cosine from 1 to 1/2: 1/2 + (1 + cos(pi done / 0.75)) / 4.
    assert rates("constant_tail", (0.0, 0.25, 0.375, 0.5)) == [1, 0.875, 0.75, 0.625]
    assert rates("cyclic_tail", (0.0, 0.25, 0.375, 0.5)) == [1, 0.875, 0.75, 0.625]
    assert rates("constant_tail", (0.75, 0.9, 1.0)) == [0.5, 0.5, 0.5]
    # Two cycles of an eighth of the run each, from 1/2 to 0; a quarter into the first, cos(pi/4).
    quarter = round((1 + math.sqrt(0.5)) / 4, 4)
    at = (0.75, 0.75 + 1 / 32, 0.8125, 0.875, 0.9375)
    assert rates("cyclic_tail", at, cycles=2) == [0.5, quarter, 0.25, 0.5, 0.25]


def test_networks_that_do_not_divide_the_epochs_are_refused():
    with pytest.raises(
        InputError, match="networks is 3; choose a number that divides the 40 epochs"
    ):
        training_methods(RunConfig(), 3)
    with pytest.raises(
        InputError, match="networks is 4; .* divides the last quarter of 40 epochs"
    ):
        training_methods(RunConfig(), 4)
    with pytest.raises(InputError, match="networks is 1; .* divides the last quarter of 6 epochs"):
        training_methods(RunConfig(epochs=6), 1)
    with pytest.raises(InputError, match="networks is 0; "):
        training_methods(RunConfig(), 0)


def test_a_tail_keeps_its_own_epochs_alone():
    for method in ("fge", "swa"):
        config, chosen = training_methods(SMALL, 2)[method]
        [record] = runs.obtain([config], device="cpu", progress=False)
        assert record.kept.tolist() == [6, 7] == np.flatnonzero(chosen.weights).tolist()


def test_until_the_tail_begins_both_tails_are_one_run():
    methods = training_methods(SMALL, 1)
    configs = [methods["fge"][0], methods["swa"][0]]
    cyclic, constant = runs.obtain(configs, device="cpu", progress=False)
    np.testing.assert_array_equal(cyclic.predicted[:6], constant.predicted[:6])
    assert (cyclic.curves["lr"][6:] < constant.curves["lr"][6:]).all()


def test_ensembles_average_probabilities_and_not_logits():
    # Logits (0, 0) and (0, 4): their mean gives softmax(0, 2), which is not the mean of softmaxes.
    logits = np.array([[[0.0, 0.0]], [[0.0, 4.0]]])
    probs = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    record = RunRecord.from_arrays(probs, [1])
    mixed = fusion.fuse(record, fusion.Fusion(np.array([0.5, 0.5])))
    assert mixed[0, 1] == pytest.approx((0.5 + 1 / (1 + math.exp(-4))) / 2)
    assert mixed[0, 1] < 1 / (1 + math.exp(-2))


def test_scores_are_those_of_the_networks_by_hand():
    results = compare_protocols([SMALL], item="x", networks=2, decay=0.5, splits=(3,))
    by_method = {result.method: result for result in results}
    assert {m: r.networks for m, r in by_method.items()} == {
        "snapshot": 2, "fge": 2, "swa": 1, "ema": 1
    }  # fmt: skip
    methods = training_methods(SMALL, 2, 0.5)
    for method in ("snapshot", "fge"):
        config, _ = methods[method]
        [record] = runs.obtain([config])
        test = record.split(3)[1]
        a, b = test.probs.astype(float)  # of the two kept epochs
        assert by_method[method].accuracy == ((a + b).argmax(axis=1) == test.labels).mean()
    [record] = runs.obtain([methods["ema"][0]])
    assert by_method["ema"].accuracy == record.split(3)[1].accuracy[-1]


def test_swa_is_the_mean_of_the_weights_with_batchnorm_estimated_anew():
    config, weights = training_methods(SMALL, 2)["swa"]
    job = runs.averaged(config, "swa", weights)
    runs.obtain([job], device="cpu", progress=False)
    place = runs.folder(config)
    one, two = (load_tensors(checkpoint_path(place, epoch)) for epoch in (6, 7))
    mean = load_tensors(checkpoint_path(runs.folder(job.config), 0))
    torch.testing.assert_close(mean["0.weight"], (one["0.weight"] + two["0.weight"]) / 2)
    data = load(config)
    model = build_model(config, data)
    model.load_state_dict(mean)
    seen = model[0](data.normalize(data.images)).detach()
    torch.testing.assert_close(mean["1.running_mean"], seen.mean(dim=(0, 2, 3)))


def test_students_of_final_networks():
    ensemble = independent_members(SMALL, 2)
    job = student_of_finals("independent", ensemble)
    assert [(m.config, m.epoch, m.weight) for m in job.members] == [(c, 7, 0.5) for c in ensemble]
    assert dataclasses.replace(job.config, student=None, keep_every=1) == SMALL
    results = compare_students([SMALL], item="x", splits=(0, 1), members=2)
    [student] = runs.obtain([job])
    of_two = {r.split_seed: r.accuracy for r in results if r.method == "student_independent"}
    assert of_two == {s: student.split(s)[1].accuracy[-1] for s in (0, 1)}
    cost = {r.method: r.train_seconds for r in results}
    both = sum(record.provenance["seconds"] for record in runs.obtain([*ensemble, job]))
    assert cost["student_independent"] == pytest.approx(both, abs=0.01)


def test_losses_are_tried_on_the_validation_half():
    losses = [{"temperature": 1.0}, {"soft_share": 0.0}]
    tried = try_losses([SMALL], losses, split=1)
    [record] = runs.obtain([SMALL])
    job = runs.student(SMALL, "kf", knowledge_fusion(record.split(1)[0]), soft_share=0.0)
    [student] = runs.obtain([job])
    assert tried[1] == [student.split(1)[0].accuracy[-1]]
    assert len(tried) == 2


def test_the_baselines_spend_the_validation_half_and_average_the_weights():
    results = compare_baselines([SMALL], item="x", splits=[1])
    assert [r.method for r in results] == ["ema_stopped", "clean_half", "clean_half_added"]
    assert {r.split_seed for r in results} == {1}
    alone = dataclasses.replace(SMALL, validation_half="alone:1", keep_every=SMALL.epochs)
    [record] = runs.obtain([alone])
    test = record.split(1)[1]
    assert results[1].accuracy == pytest.approx(test.accuracy[-1])


def test_replicates_draw_their_own_noise_and_take_changes_last():
    runs_of_both = replicates("quick", [("symmetric", 0.4)], [3, 4], epochs=6)
    assert [(r.condition, r.seed, r.noise_seed, r.epochs) for r in runs_of_both] == [
        ("augmented_sym40", 3, 3, 6),
        ("augmented_sym40", 4, 4, 6),
        ("memorising_sym40", 3, 3, 6),
        ("memorising_sym40", 4, 4, 6),
    ]


@pytest.mark.parametrize(("augment", "views"), [("none", 0), ("crop", 8)])
def test_only_students_of_augmented_runs_have_a_bounded_set_of_views(augment, views):
    run = dataclasses.replace(SMALL, augment=augment)
    assert student_of_finals("single", [run], 8).config.student.teacher_views == views


@pytest.mark.parametrize("kept", [{"keep_best": 5}, {"keep": (3, 5)}])
def test_other_networks_keep_what_their_method_needs(kept):
    config = RunConfig(**kept)
    others = [independent_members(config, 2)[1]]
    others += [other for other, _ in training_methods(config, 5).values()]
    assert {(other.keep, other.keep_best) for other in others} == {((), 0)}


def test_cycles_after_a_warm_up_are_refused():
    with pytest.raises(InputError, match="warmup is 2.0; make it 0, so that cycles are whole"):
        training_methods(RunConfig(epochs=8, warmup=2.0), 2)
