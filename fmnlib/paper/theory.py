"""Deep linear networks, whose forgetting can be computed (AAAI, section 4, Fig. 4).

A network y = W_L ... W_1 x is trained by gradient descent on half the mean squared error, with
labels y of -1 and 1. What it learns is one vector, the separator w. On the principal axes of the
data its components move independently of each other, the leading ones first, and a point is
forgotten when they carry the separator across it.

Truncation to leading components then takes the place of training time: the k-th "epoch" of a
linear model is its solution W(k) on the first k components, so that `fmnlib.scores` applies to
`correct[components, samples]` as it does to `correct[epochs, samples]`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from fmnlib import scores
from fmnlib.config import InputError

Vector = Float[np.ndarray, " features"]
Inputs = Float[np.ndarray, "samples features"]
Labels = Float[np.ndarray, " samples"]  # -1 and 1
Path = Float[np.ndarray, "times features"]  # of a separator
Layers = Sequence[Float[np.ndarray, "_ _"]]
Sets = Bool[np.ndarray, "rows samples"]


def principal_axes(inputs: Inputs) -> tuple[Vector, Float[np.ndarray, "features features"]]:
    """The mean square s_j of the data along each principal axis, descending, and the axes.

    The components of the data, centred or not, are `inputs @ axes`.

    >>> spectrum, axes = principal_axes(np.array([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]]))
    >>> spectrum.tolist(), abs(axes).tolist()
    ([3.0, 0.6666666666666666], [[0.0, 1.0], [1.0, 0.0]])
    """
    spectrum, axes = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    return spectrum[::-1].clip(0), axes[:, ::-1]


def separator_path(
    start: Vector,
    optimum: Vector,
    spectrum: Vector,
    *,
    lr: float,
    steps: int,
    depth: int = 1,
    gain: float = 1.0,
) -> Path:
    """The separator after each step of gradient descent, in closed form (AAAI, section 4).

    w_j(n) = λ_j^n w_j(0) + (1 - λ_j^n) w_j^opt with λ_j = 1 - lr s_j L gain^(2L - 2), where the
    gain is the scale of each layer. At depth L = 1 this is exact. A deeper network follows it to
    first order in the rate over a fixed number of steps, and for all time in the limit of a large
    gain. Start and optimum (of least squares) are on the axes of `principal_axes`.

    >>> one = np.ones(1)
    >>> separator_path(0 * one, one, one, lr=0.25, steps=2, depth=2)[:, 0].tolist()
    [0.0, 0.5, 0.75]
    """
    decay = 1 - lr * depth * gain ** (2 * depth - 2) * spectrum
    remaining = decay ** np.arange(steps + 1)[:, None]
    return remaining * start + (1 - remaining) * optimum


def _balanced_layers(
    separator: Vector, *, depth: int, width: int, gain: float = 1.0, seed: int = 0
) -> Layers:
    """Weights W_1 ... W_L, each an isometry times the gain, whose product is the separator."""
    if depth == 1:
        return [separator[None].copy()]
    share, features = separator / gain**depth, len(separator)
    if width <= features or share @ share > 1:
        size = f"width {width} and gain {gain} with {features} features"
        raise InputError(f"{size}; make both larger: the separator does not fit in")
    rng = np.random.default_rng(seed)
    first = np.linalg.qr(rng.normal(size=(width, features + 1)))[0]
    last = first @ np.append(share, np.sqrt(1 - share @ share))
    layers = [gain * first[:, :features]]
    for _ in range(depth - 2):
        rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
        layers.append(gain * rotation)
        last = rotation @ last
    return [*layers, gain * last[None]]


def _gradient_path(
    layers: Layers, inputs: Inputs, labels: Labels, *, lr: float, steps: int
) -> Path:
    """The separator after each step of full-batch gradient descent on a deep linear network."""
    moment, target = inputs.T @ inputs / len(inputs), labels @ inputs / len(inputs)
    layers, path = list(layers), []
    for _ in range(steps + 1):
        below = [np.eye(inputs.shape[1])]
        for layer in layers:
            below.append(layer @ below[-1])
        path.append(below[-1][0])
        gradient = (below[-1] @ moment - target).T  # of the loss, by the product of the layers
        above = np.eye(1)
        for index in reversed(range(len(layers))):
            layer = layers[index]
            layers[index] = layer - lr * above.T @ (below[index] @ gradient).T
            above = above @ layer
    return np.array(path)


def compare_paths(
    start: Vector,
    inputs: Inputs,
    labels: Labels,
    *,
    speed: float,
    steps: int,
    depth: int = 1,
    gain: float = 1.0,
) -> tuple[Path, Path]:
    """The separator's path by gradient descent on a real network, and by `separator_path`.

    The layers start as isometries times the gain, which wide random layers come close to, so that
    the closed form holds at the start exactly. `start` is w(0), inputs are data on their principal
    axes, and `speed` is lr L gain^(2L - 2). An `InputError` where gain^L, which bounds the product
    of such layers, does not exceed the length of w(0).

    >>> paths = compare_paths(np.ones(1), np.ones((1, 1)), -np.ones(1), speed=0.5, steps=2)
    >>> [path[:, 0].tolist() for path in paths]
    [[1.0, 0.0, -0.5], [1.0, 0.0, -0.5]]
    """
    spectrum = (inputs**2).mean(axis=0)
    optimum = labels @ inputs / len(inputs) / spectrum
    lr = speed / depth / gain ** (2 * depth - 2)
    layers = _balanced_layers(start, depth=depth, width=2 * len(start) + 2, gain=gain)
    closed = separator_path(start, optimum, spectrum, lr=lr, steps=steps, depth=depth, gain=gain)
    return _gradient_path(layers, inputs, labels, lr=lr, steps=steps), closed


def forget_time(path: Path, inputs: Inputs, labels: Labels) -> Int[np.ndarray, " samples"]:
    """The first step after which w(n) y x <= 0 (AAAI, Claim 1).

    It is -1 for points that are wrong at the start, and for those that never are.

    >>> path = np.array([[2.0], [1.0], [-1.0]])
    >>> forget_time(path, np.array([[1.0], [-1.0]]), np.array([1.0, 1.0])).tolist()
    [2, -1]
    """
    lost = path @ (inputs * labels[:, None]).T <= 0
    return np.where(lost.any(axis=0) & ~lost[0], lost.argmax(axis=0), -1)


def early_forget_time(
    start: Vector,
    optimum: Vector,
    spectrum: Vector,
    inputs: Inputs,
    labels: Labels,
    *,
    lr: float,
    depth: int = 1,
) -> Float[np.ndarray, " samples"]:
    """Steps after which each point would be forgotten if the separator kept its initial speed.

    F(0) / -F'(0), with F = w y x and F' = -lr y L sum_j (w_j(0) - w_j^opt) s_j x_j + O(lr^2)
    (AAAI, section 4): mass on the leading components makes for early forgetting. Infinite for
    points that the separator at first does not move towards.

    >>> one = np.ones(1)
    >>> early_forget_time(one, -one, one, np.ones((1, 1)), one, lr=0.125).tolist()
    [4.0]
    """
    signed = inputs * labels[:, None]
    speed = lr * depth * signed @ (spectrum * (start - optimum))
    return np.divide(signed @ start, speed, out=np.full(len(speed), np.inf), where=speed > 0)


def truncated_predictions(
    inputs: Inputs,
    labels: Int[np.ndarray, " samples"],
    eval_inputs: Float[np.ndarray, "evaluated features"],
    classes: int,
) -> Int[np.ndarray, "components evaluated"]:
    """Predictions of the least-squares classifier truncated to its leading components.

    Row k is the prediction of W(k), the optimum W^opt on the first k principal components of the
    centred training data with a bias. With `correct = predictions == labels`,
    `scores.forgotten_after(correct, k)` is the paper's S(k). Components whose mean square is below
    1e-6 of the first one's are left out.

    >>> x = np.array([[-2.0, 0.1], [2.0, -0.1], [2.0, 0.1]])
    >>> truncated_predictions(x, np.array([0, 1, 1]), x, 2).tolist()
    [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    """
    mean = inputs.mean(axis=0)
    spectrum, axes = principal_axes(inputs - mean)
    rank = int((spectrum > 1e-6 * spectrum[0]).sum())
    spectrum, axes = spectrum[:rank], axes[:, :rank]
    targets = np.eye(classes)[labels]
    bias = targets.mean(axis=0)
    parts = (inputs - mean) @ axes
    optimum = parts.T @ (targets - bias) / len(inputs) / spectrum[:, None]
    outputs = np.tile(bias, (len(eval_inputs), 1))
    predicted = [outputs.argmax(axis=1)]
    for part, weights in zip(((eval_inputs - mean) @ axes).T, optimum, strict=True):
        outputs += part[:, None] * weights
        predicted.append(outputs.argmax(axis=1))
    return np.array(predicted)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How closely a linear model and a network forget the same samples, by network epoch."""

    #: Pearson's correlation of membership in S(k) and in M(n); 0 where a set is empty or full
    correlation: Float[np.ndarray, " epochs"]
    share: Float[np.ndarray, " epochs"]  #: Share of M(n) that is in S(k)
    #: The correlation after each random exchange of samples
    correlation_by_chance: Float[np.ndarray, "rounds epochs"]
    share_by_chance: Float[np.ndarray, "rounds epochs"]  #: Likewise


def agreement(
    shallow: Bool[np.ndarray, "components samples"],
    deep: Bool[np.ndarray, "epochs samples"],
    groups: Int[np.ndarray, " samples"],
    *,
    least: int = 10,
    rounds: int = 1000,
) -> Agreement:
    """Compare S(k), what a linear model forgets, with M(n) of a network (AAAI, section 4).

    Both are given by which samples are right, after components and after epochs. Epochs n with
    fewer than `least` samples in M(n) are left out, but never the first. The permutation test
    exchanges samples within their group alone, in all rows alike: with the true classes as groups,
    sets that agree only because some classes are forgotten more than others agree as much after
    the exchange as before.

    >>> right = np.array([[False, True], [True, False], [False, False]])
    >>> result = agreement(right, right, np.array([0, 1]), least=1, rounds=3)
    >>> result.correlation.tolist(), result.share.tolist()
    ([1.0], [1.0])
    """
    target = _forgotten_sets(deep)
    sets = _matched(_forgotten_sets(shallow), len(target))
    enough = max(1, int((target.sum(axis=1) >= least).sum()))
    target, sets = target[:enough], sets[:enough]
    orders = _shuffled(groups, rounds)
    return Agreement(
        _correlation(sets, target),
        _overlap_share(sets, target),
        np.array([_correlation(sets[:, order], target) for order in orders]),
        np.array([_overlap_share(sets[:, order], target) for order in orders]),
    )


def p_value(observed: float, chance: Float[np.ndarray, " rounds"]) -> float:
    """The p-value of a one-sided permutation test; never 0, and NaN if `observed` is NaN.

    >>> p_value(3.0, np.array([1.0, 2.0, 3.0]))
    0.5
    """
    p = (1 + (chance >= observed).sum()) / (1 + len(chance))
    return float("nan") if np.isnan(observed) else float(p)


def _forgotten_sets(correct: Sets) -> Bool[np.ndarray, "rows-1 samples"]:
    """What is right in some later row and wrong in the last, after each row but the last."""
    return np.array([scores.forgotten_after(correct, row) for row in range(len(correct) - 1)])


def _matched(sets: Sets, count: int) -> Bool[np.ndarray, "count samples"]:
    """The rows k = (n - β) / α for n below count, with α and β such that both ends meet.

    The paper matches n = α k + β and does not report α and β; this choice fits nothing.
    """
    return sets[np.round(np.linspace(0, len(sets) - 1, count)).astype(int)]


def _correlation(one: Sets, other: Sets) -> Float[np.ndarray, " rows"]:
    """Pearson's correlation of membership in the two sets (phi), row by row."""
    p, q = one.mean(axis=1), other.mean(axis=1)
    spread = np.sqrt(p * (1 - p) * q * (1 - q))
    excess = (one & other).mean(axis=1) - p * q
    return np.divide(excess, spread, out=np.zeros(len(p)), where=spread > 0)


def _overlap_share(shallow: Sets, deep: Sets) -> Float[np.ndarray, " rows"]:
    """The part of the deep learner's set that is in the shallow one's; NaN where it is empty."""
    size, both = deep.sum(axis=1), (shallow & deep).sum(axis=1)
    return np.divide(both, size, out=np.full(len(size), np.nan), where=size > 0)


def _shuffled(
    groups: Int[np.ndarray, " samples"], rounds: int, seed: int = 0
) -> Int[np.ndarray, "rounds samples"]:
    """Random permutations of the samples within their groups."""
    rng, place = np.random.default_rng(seed), np.argsort(groups, kind="stable")
    shuffled = [np.lexsort((rng.random(len(groups)), groups)) for _ in range(rounds)]
    return np.array(shuffled)[:, np.argsort(place)]
