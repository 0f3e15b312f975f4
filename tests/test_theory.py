"""fmnlib.paper.theory against brute force: gradient descent on real deep linear networks."""

import numpy as np
import pytest
import torch

from fmnlib import InputError, scores
from fmnlib.paper.theory import (
    _balanced_layers,
    _gradient_path,
    compare_paths,
    early_forget_time,
    forget_time,
    principal_axes,
    separator_path,
    truncated_predictions,
)

SAMPLES, FEATURES, WIDTH = 200, 4, 12


@pytest.fixture(scope="module")
def problem():
    """Data on their principal axes, labels, spectrum, least-squares optimum and a start."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(SAMPLES, FEATURES)) * [1.0, 0.8, 0.5, 0.3]
    labels = np.where(raw @ rng.normal(size=FEATURES) + rng.normal(size=SAMPLES) > 0, 1.0, -1.0)
    spectrum, axes = principal_axes(raw)
    inputs = raw @ axes
    optimum = np.linalg.lstsq(inputs, labels)[0]
    start = rng.normal(size=FEATURES)
    return inputs, labels, spectrum, optimum, 0.6 * start / np.linalg.norm(start)


def by_autograd(layers, inputs, labels, lr, steps):
    """Brute force: a torch network of linear layers, its loss, SGD on all of the data."""
    weights = [torch.tensor(layer, requires_grad=True) for layer in layers]
    x, y, path = torch.tensor(inputs), torch.tensor(labels), []
    optimizer = torch.optim.SGD(weights, lr)
    for _ in range(steps + 1):
        product, hidden = torch.eye(inputs.shape[1], dtype=torch.float64), x.T
        for weight in weights:
            product, hidden = weight @ product, weight @ hidden
        path.append(product.detach().numpy()[0].copy())
        optimizer.zero_grad()
        ((hidden[0] - y) ** 2).mean().div(2).backward()
        optimizer.step()
    return np.array(path)


def pair(problem, *, depth, gain=1.0, lr, steps):
    """The separator's path by brute force, and in closed form; lr is that of the separator."""
    inputs, labels, spectrum, optimum, start = problem
    rate = lr / gain ** (2 * depth - 2) / depth
    layers = _balanced_layers(start, depth=depth, width=WIDTH, gain=gain, seed=1)
    closed = separator_path(start, optimum, spectrum, lr=rate, steps=steps, depth=depth, gain=gain)
    return by_autograd(layers, inputs, labels, rate, steps), closed


def worst(problem, **settings):
    descended, closed = pair(problem, **settings)
    return np.abs(descended - closed).max()


def test_principal_axes_diagonalise_the_data(problem):
    raw = np.random.default_rng(3).normal(size=(SAMPLES, FEATURES))
    spectrum, axes = principal_axes(raw)
    np.testing.assert_allclose(axes.T @ axes, np.eye(FEATURES), atol=1e-12)
    parts = raw @ axes
    np.testing.assert_allclose(parts.T @ parts / SAMPLES, np.diag(spectrum), atol=1e-12)
    assert (np.diff(spectrum) < 0).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("gain", [1.0, 1.7])
def test_balanced_layers_are_isometries_with_the_given_product(problem, depth, gain):
    start = problem[-1]
    layers = _balanced_layers(start, depth=depth, width=WIDTH, gain=gain, seed=2)
    product = np.linalg.multi_dot([*layers[::-1]]) if depth > 1 else layers[0]
    np.testing.assert_allclose(product[0], start, atol=1e-12)
    if depth > 1:
        for layer in layers[:-1]:
            square = layer.T @ layer
            np.testing.assert_allclose(square, gain**2 * np.eye(len(square)), atol=1e-12)
        np.testing.assert_allclose(layers[-1] @ layers[-1].T, gain**2, atol=1e-12)


def test_layers_that_cannot_be_are_refused(problem):
    with pytest.raises(InputError, match="width 4 and gain 1.0 with 4 features; make both larger"):
        _balanced_layers(problem[-1], depth=2, width=4)
    with pytest.raises(InputError, match="the separator does not fit in"):
        _balanced_layers(problem[-1], depth=3, width=WIDTH, gain=0.5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradient_path_is_that_of_autograd(problem, depth):
    inputs, labels, *_, start = problem
    layers = _balanced_layers(start, depth=depth, width=WIDTH, gain=1.2)
    before = [layer.copy() for layer in layers]
    path = _gradient_path(layers, inputs, labels, lr=0.07, steps=200)
    np.testing.assert_allclose(path, by_autograd(before, inputs, labels, 0.07, 200), atol=1e-12)
    for layer, old in zip(layers, before):
        np.testing.assert_array_equal(layer, old)


# ---------------------------------------------------------------- the closed form


@pytest.mark.parametrize("lr", [0.01, 0.3, 1.2])
def test_at_depth_1_the_closed_form_is_exact(problem, lr):
    descended, closed = pair(problem, depth=1, lr=lr, steps=300)
    np.testing.assert_allclose(descended, closed, atol=1e-12)
    inputs, labels = problem[:2]
    times = forget_time(descended, inputs, labels)
    np.testing.assert_array_equal(times, forget_time(closed, inputs, labels))
    assert (times > 0).sum() >= 5


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_over_some_steps_the_error_is_of_second_order_in_the_rate(problem, depth, steps):
    errors = [worst(problem, depth=depth, lr=lr, steps=steps) for lr in (0.004, 0.002, 0.001)]
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(ratios, 4, rtol=0.03)


@pytest.mark.parametrize("depth", [2, 3])
def test_over_all_time_the_error_does_not_vanish_with_the_rate(problem, depth):
    coarse, fine = (worst(problem, depth=depth, lr=4 / n, steps=n) for n in (400, 800))
    assert coarse > 0.03
    np.testing.assert_allclose(fine, coarse, rtol=0.05)


@pytest.mark.parametrize("depth", [2, 3])
def test_over_all_time_the_error_vanishes_with_the_gain(problem, depth):
    errors = [worst(problem, depth=depth, gain=g, lr=0.01, steps=800) for g in (4.0, 8.0, 16.0)]
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(ratios, 4.0**depth, rtol=0.15)


@pytest.mark.parametrize(("depth", "gain"), [(1, 1.0), (2, 1.5), (3, 1.5)])
def test_compare_paths_gives_both(problem, depth, gain):
    inputs, labels, *_, start = problem
    descended, closed = compare_paths(
        start, inputs, labels, speed=0.05, steps=40, depth=depth, gain=gain
    )
    ours, theirs = pair(problem, depth=depth, gain=gain, lr=0.05, steps=40)
    np.testing.assert_allclose(closed, theirs, atol=1e-12)
    np.testing.assert_allclose(descended, ours, atol=1e-12)  # whatever the width and the turns


# ---------------------------------------------------------------- forget times


def crossing(path, inputs, labels):
    """Where the margins first reach 0, in steps, by straight lines between steps; else NaN."""
    margins = path @ (inputs * labels[:, None]).T
    times = np.full(len(labels), np.nan)
    for n, margin in enumerate(margins.T):
        below = [i for i in range(1, len(margin)) if margin[i] <= 0]
        if margin[0] > 0 and below:
            i = below[0]
            times[n] = i - 1 + margin[i - 1] / (margin[i - 1] - margin[i])
    return times


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_forget_time_equals_plain_loops_and_is_finite_for_the_forgotten(problem, depth):
    inputs, labels = problem[:2]
    path = pair(problem, depth=depth, lr=0.1, steps=400)[0]
    times = forget_time(path, inputs, labels)
    for x, y, time in zip(inputs, labels, times):
        margins = [y * float(w @ x) for w in path]
        lost = [n for n, margin in enumerate(margins) if margin <= 0]
        assert time == (lost[0] if lost and margins[0] > 0 else -1)
        if margins[0] > 0 > margins[-1]:  # forgotten: Claim 1
            assert 0 < time < len(path)
    assert (times > 0).sum() >= 5


@pytest.mark.parametrize("depth", [2, 3])
def test_forget_times_agree_to_the_order_of_the_rate(problem, depth):
    # Points that the closed form forgets after 5.5 steps: they lie by the border, nearer to it
    # the smaller the rate. An error of second order in the margin is one of first order in time.
    errors = []
    for lr in (0.02, 0.01, 0.005):
        descended, closed = pair(problem, depth=depth, lr=lr, steps=12)
        border, move = (closed[5] + closed[6]) / 2, closed[5] - closed[6]
        border /= np.linalg.norm(border)
        sideways = np.random.default_rng(5).normal(size=(40, FEATURES)) / 8
        points = move / np.linalg.norm(move) + sideways
        points -= np.outer(points @ border, border)
        labels = np.ones(len(points))
        np.testing.assert_allclose(crossing(closed, points, labels), 5.5, atol=1e-6)
        errors.append(np.abs(crossing(descended, points, labels) - 5.5).max())
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.1)


@pytest.mark.parametrize("depth", [2, 3])
def test_forget_times_over_all_time_agree_as_the_gain_grows(problem, depth):
    inputs, labels = problem[:2]
    errors = []
    for gain in (2.0, 4.0, 8.0):
        both = [
            crossing(path, inputs, labels)
            for path in pair(problem, depth=depth, gain=gain, lr=0.01, steps=800)
        ]
        either = np.isfinite(both).all(axis=0)
        assert either.sum() >= 5
        errors.append(np.abs(both[0] - both[1])[either].max() / 800)
    assert errors[2] < 1e-3
    assert (np.divide(errors[:-1], errors[1:]) > 4.0**depth / 3).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_first_speed_is_the_papers_up_to_second_order(problem, depth):
    inputs, labels, spectrum, optimum, start = problem
    errors = []
    for lr in (0.004, 0.002, 0.001):
        early = early_forget_time(
            start, optimum, spectrum, inputs, labels, lr=lr / depth, depth=depth
        )
        path = pair(problem, depth=depth, lr=lr, steps=1)[0]
        before, after = (path @ (inputs * labels[:, None]).T).copy()
        nearing = np.isfinite(early)
        np.testing.assert_array_equal(nearing & (before > 0), (after < before) & (before > 0))
        speed = before[nearing] / early[nearing]
        errors.append(np.abs(before - after)[nearing] - speed)
    errors = [np.abs(error).max() for error in errors]
    if depth == 1:
        assert max(errors) < 1e-14
    else:
        np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.03)


def test_mass_on_the_leading_component_is_forgotten_first():
    # Two points, as right as each other, on components that move as far but not as fast.
    spectrum, start, optimum = np.array([1.0, 0.1]), np.ones(2), -np.ones(2)
    points, labels = np.eye(2), np.ones(2)
    closed = separator_path(start, optimum, spectrum, lr=0.01, steps=1000)
    times = forget_time(closed, points, labels)
    # 2 λ^n = 1: n = log 2 / -log(1 - 0.01 s), rounded up
    assert times.tolist() == [69, 693]
    early = early_forget_time(start, optimum, spectrum, points, labels, lr=0.01)
    np.testing.assert_allclose(early, [50, 500])


# ---------------------------------------------------------------- truncation


def test_truncated_predictions_are_those_of_regression_on_components():
    rng = np.random.default_rng(7)
    inputs, evaluated = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(9, 5))
    labels = rng.integers(0, 3, 80)
    predicted = truncated_predictions(inputs, labels, evaluated, 3)
    centred = inputs - inputs.mean(axis=0)
    axes = np.linalg.svd(centred)[2]  # rows
    for count in range(6):
        parts = np.column_stack([np.ones(80), inputs @ axes[:count].T])
        answer = np.linalg.lstsq(parts, np.eye(3)[labels])[0]
        shown = np.column_stack([np.ones(9), evaluated @ axes[:count].T]) @ answer
        assert predicted[count].tolist() == shown.argmax(axis=1).tolist()
    assert len(predicted) == 6


def test_a_constant_feature_is_left_out_and_s_k_is_forgotten_after():
    rng = np.random.default_rng(8)
    inputs = np.column_stack([rng.normal(size=(50, 3)), np.ones(50)])
    labels = (inputs[:, 0] + rng.normal(size=50) > 0).astype(int)
    predicted = truncated_predictions(inputs, labels, inputs, 2)
    assert len(predicted) == 4  # bias and three components
    correct = predicted == labels
    for k in range(3):
        expected = [any(correct[k + 1 :, n]) and not correct[-1, n] for n in range(50)]
        assert scores.forgotten_after(correct, k).tolist() == expected
