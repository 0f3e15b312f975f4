"""Other weights over the epochs of a run, chosen on its validation half, to compare with.

Greedy selection with replacement (Caruana, Niculescu-Mizil, Crew and Ksikes, ICML 2004) counts
how often each network is chosen; maximum likelihood (by EM) gives each the weight under which the
mixture finds the validation labels likeliest. Both return a `fmnlib.fusion.Fusion`.
"""

import numpy as np
from jaxtyping import Float64

from fmnlib.config import InputError
from fmnlib.fusion import Fusion, kept_probs, refuse_test, to_float64
from fmnlib.record import RunRecord

__all__ = ["em_step", "greedy_selection", "likelihood_weights"]

_SMALLEST = 1e-12  # what `fmnlib.stats.nll` counts a probability of 0 as
_NEGLIGIBLE = 1e-4  # a weight below it costs a network and changes nothing


def greedy_selection(val: RunRecord, size: int) -> Fusion:
    """Add network after network, each the one that makes the mean of all chosen most accurate.

    A network may be added again, so that its weight is its count / size. Of the nested ensembles
    of 1, 2, ..., `size` networks the most accurate is returned, the smallest at a tie. Between
    networks that tie, the earliest is added.

    Args:
        val: The validation half of a run.
        size: Number of networks that are added.

    >>> import numpy as np
    >>> probs = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]])
    >>> greedy_selection(RunRecord.from_arrays(probs, [0, 1]), size=4).weights.tolist()
    [0.5, 0.5]
    """
    refuse_test(val)
    if size < 1:
        raise InputError(f"size is {size}; allow 1 or more networks")
    probs = to_float64(kept_probs(val))
    total = np.zeros(probs.shape[1:])
    chosen: list[int] = []
    reached: list[int] = []
    while len(chosen) < size:
        right = [int(((total + p).argmax(axis=1) == val.labels).sum()) for p in probs]
        best = int(np.argmax(right))
        chosen.append(best)
        reached.append(right[best])
        total += probs[best]
    length = int(np.argmax(reached)) + 1
    return _fusion(val, np.bincount(chosen[:length], minlength=len(probs)) / length)


def likelihood_weights(val: RunRecord, *, tolerance: float = 1e-3) -> Fusion:
    """The weights under which the mixture finds the validation labels likeliest, by EM.

    Maximises L(w) = mean_n log sum_e w_e p_e(y_n | x_n), which is concave in w. At any w no
    other weights reach more than L(w) + max_e dL/dw_e - 1 (the tangent lies above L, and is
    largest at a single epoch): EM stops when that bound promises less than the tolerance.
    Weights below 1e-4 are then dropped.

    Args:
        val: The validation half of a run.
        tolerance: How far from the optimum the log-likelihood may stay, in nats a sample.

    >>> import numpy as np
    >>> probs = np.array([[[0.8, 0.2], [0.8, 0.2]], [[0.2, 0.8], [0.2, 0.8]]])
    >>> likelihood_weights(RunRecord.from_arrays(probs, [0, 1])).weights.tolist()
    [0.5, 0.5]
    """
    refuse_test(val)
    if not tolerance > 0:
        raise InputError(f"tolerance is {tolerance}; give a number above 0")
    probs = kept_probs(val)
    likelihood = to_float64(probs[:, np.arange(len(val.labels)), val.labels]).clip(_SMALLEST)
    weights = np.full(len(probs), 1 / len(probs))
    while (step := em_step(weights, likelihood))[1] > tolerance:
        weights = step[0]
    weights = np.where(weights < _NEGLIGIBLE, 0.0, weights)
    return _fusion(val, weights / weights.sum())


def em_step(
    weights: Float64[np.ndarray, " kept"], likelihood: Float64[np.ndarray, "kept samples"]
) -> tuple[Float64[np.ndarray, " kept"], float]:
    """One step of EM for the weights of a mixture whose parts are given.

    w_e <- w_e g_e with g_e = mean_n p_e(n) / sum_k w_k p_k(n), the gradient of the mean
    log-likelihood (Dempster, Laird and Rubin, 1977).

    Args:
        weights: Not negative, of sum 1.
        likelihood: Probability p_e(n) that each part gives to each sample's label.

    Returns:
        The new weights, and max_e g_e - 1, the most, in nats a sample, that is left to gain.

    >>> import numpy as np
    >>> em_step(np.array([0.5, 0.5]), np.array([[0.75], [0.25]]))[0].tolist()
    [0.75, 0.25]
    """
    mixture = (weights[:, None] * likelihood).sum(axis=0)
    gradient = (likelihood / mixture).mean(axis=1)
    return weights * gradient, float(gradient.max()) - 1


def _fusion(val: RunRecord, of_kept: Float64[np.ndarray, " kept"]) -> Fusion:
    weights = np.zeros(val.epochs)
    weights[val.kept] = of_kept
    return Fusion(weights)
