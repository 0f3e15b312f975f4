"""Checkpoint ensembles of one run: weights over its epochs that sum to 1, and how to find them.

A single network is a one-hot vector, a horizontal ensemble is uniform over the last k, and
Knowledge Fusion (Algorithm 1 of AAAI 2025) is the vector that its search returns: the mix

    prob <- eps_i * mean(prob[A_i - w .. A_i + w]) + (1 - eps_i) * prob,    i = 1, 2, ...

is a nested convex combination: the final model has weight prod_i (1 - eps_i), the window of pick i
eps_i * prod_{j > i} (1 - eps_j). Prediction is a weighted sum, whatever the method.

Functions that select anything take the validation half and refuse the test half. All arithmetic
behind a choice is elementwise, so that results are bitwise identical on every machine.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from fmnlib.config import InputError
from fmnlib.files import open_regular, write_whole
from fmnlib.record import Columns, RunRecord, refuse_test
from fmnlib.scores import forget_fraction

BEST = 5
"""Default number of epochs that `best_epochs` averages."""

Right = Bool[np.ndarray, " samples"]
Probs = Float64[np.ndarray, "samples classes"]
_MIN_PROB = 1e-12  # smaller probabilities count as this, as in `fmnlib.stats.nll`
_NEGLIGIBLE = 1e-4  # smaller weights are dropped: they cost a network and change almost nothing
_TOLERANCE = 1e-3  # largest distance from the optimal log-likelihood, in nats per sample
_ROUNDING = 1e-12  # an interval of shares as narrow as this counts as empty
_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)  # every float16


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Weights over the epochs of a run, and how they were chosen."""

    weights: Float64[np.ndarray, " epochs"]  #: One per epoch; nonnegative, they sum to 1
    #: The chosen (epoch, share) pairs A_i, eps_i in order; empty for fixed ensembles
    picks: tuple[tuple[int, float], ...] = ()
    window: int = 0  #: Epochs averaged on either side of a pick, w
    split: int | None = None  #: Seed of the split on whose validation half it was chosen, if known

    @property
    def networks(self) -> int:
        """Number of checkpoints evaluated for one prediction."""
        return int(np.count_nonzero(self.weights))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        fields = dataclasses.asdict(self) | {"weights": self.weights.tolist()}
        write_whole(path, json.dumps(fields).encode())

    @classmethod
    def load(cls, path: Path | str) -> "Fusion":
        """Read back what `save` wrote."""
        try:
            with open_regular(Path(path)) as file:
                fields = json.load(file)
            picks = tuple((int(epoch), float(share)) for epoch, share in fields["picks"])
            weights = np.array(fields["weights"], np.float64)
            if weights.ndim != 1 or not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
                raise ValueError("weights")
            split = None if fields.get("split") is None else int(fields["split"])
            return cls(weights, picks, int(fields["window"]), split)
        except Exception as error:  # files, JSON and numpy raise half a dozen kinds between them
            raise InputError(f"{path} holds no fusion; write one with `fmn fuse RUN`") from error


Search = Callable[[RunRecord], Fusion]  # finds a fusion on a validation half


def fuse(record: RunRecord, fusion: Fusion) -> Probs:
    """Mix the kept probabilities with the weights of a fusion.

    Raises:
        InputError: If the record lacks probabilities of an epoch that has weight.

    >>> record = RunRecord.from_arrays(np.array([[[0.75, 0.25]], [[0.25, 0.75]]]), [0])
    >>> fuse(record, uniform(record)).tolist()
    [[0.5, 0.5]]
    """
    probs = _kept_probs(record)
    if len(fusion.weights) != record.epochs:
        given = f"{len(fusion.weights)} weights for {record.epochs} epochs"
        raise InputError(f"{given}; a fusion belongs to the run that it was found on")
    fused = np.zeros(probs.shape[1:])
    for epoch in np.flatnonzero(fusion.weights):  # in order, so that rounding is the same anywhere
        row = np.flatnonzero(record.kept == epoch)
        if not len(row):
            raise InputError(f"epoch {epoch} has weight but no probabilities; keep it in the run")
        fused += fusion.weights[epoch] * _to_float64(probs[row[0]])
    return fused


def accuracy(record: RunRecord, fusion: Fusion) -> float:
    """Accuracy of a fusion on a record, from 0 to 1."""
    return float(right_samples(fuse(record, fusion), record.labels).mean())


def single(record: RunRecord) -> Fusion:
    """The final network alone."""
    return around(record, record.epochs - 1, window=0)


def early_stopping(val: RunRecord) -> Fusion:
    """The network with the best validation accuracy, the earliest one at a tie."""
    return best_epochs(val, 1)


def horizontal(record: RunRecord, networks: int) -> Fusion:
    """The last networks, equally weighted."""
    kept = _enough(record, networks)
    return _uniform_over(record, range(kept - networks, kept))


def fixed_jumps(record: RunRecord, networks: int) -> Fusion:
    """Equally spaced networks, the last one among them, equally weighted.

    >>> record = RunRecord.from_arrays(np.full((6, 1, 2), 0.5), [0])
    >>> np.flatnonzero(fixed_jumps(record, 3).weights).tolist()
    [1, 3, 5]
    """
    kept = _enough(record, networks)
    return _uniform_over(record, [(i + 1) * kept // networks - 1 for i in range(networks)])


def around(record: RunRecord, epoch: int, window: int) -> Fusion:
    """An epoch and the kept ones on either side of it, equally weighted; clipped at the ends."""
    kept = record.kept.tolist()
    if epoch not in kept:
        raise InputError(f"epoch {epoch} is not kept; kept are {kept}")
    return _uniform_over(record, range(len(kept))[_clip_window(kept.index(epoch), window)])


def early_stopping_window(val: RunRecord, networks: int) -> Fusion:
    """The network with the best validation accuracy and its neighbours, equally weighted.

    >>> record = RunRecord.from_arrays(np.full((6, 1, 2), 0.5), [0])
    >>> early_stopping_window(record, 3).weights.tolist()[:4]  # the earliest of equals: epoch 0
    [0.3333333333333333, 0.3333333333333333, 0.3333333333333333, 0.0]
    """
    kept = _enough(val, networks)
    first = int(early_stopping(val).weights[val.kept].argmax()) - networks // 2
    first = min(max(first, 0), kept - networks)
    return _uniform_over(val, range(first, first + networks))


def best_epochs(val: RunRecord, networks: int | None = None) -> Fusion:
    """The networks with the best validation accuracy, equally weighted; earlier ones at a tie.

    `networks` defaults to `BEST`, or to all kept networks if there are fewer.

    >>> probs = np.array([[[0.4, 0.6]], [[0.6, 0.4]], [[0.6, 0.4]]])
    >>> best_epochs(RunRecord.from_arrays(probs, [0]), 2).weights.tolist()
    [0.0, 0.5, 0.5]
    """
    refuse_test(val)
    networks = min(BEST, len(val.kept)) if networks is None else networks
    _enough(val, networks)
    order = np.argsort(-val.accuracy[val.kept], kind="stable")
    return _uniform_over(val, order[:networks].tolist())


def uniform(record: RunRecord) -> Fusion:
    """All kept networks, equally weighted."""
    return _uniform_over(record, range(len(record.kept)))


def knowledge_fusion(
    val: RunRecord,
    *,
    window: int | None = None,
    max_picks: int | None = None,
    grid: Float[np.ndarray, " shares"] | None = None,
    start: str = "final",
) -> Fusion:
    """Find what the final model forgot and mix it back in (Algorithm 1 of AAAI 2025).

    Repeats: pick the epoch with the largest forget fraction against the predictor fused so far,
    average the probabilities of its window, choose the share by validation accuracy, mix. Stops
    when validation accuracy no longer rises.

    Args:
        val: The validation half of a run.
        window: Kept epochs averaged on either side of a pick (clipped at the ends), w. Where not
            given, the papers' 1, or 0 if fewer than three epochs are kept.
        max_picks: 1 is the papers' "(i)"; None goes on to the end, "(inf)".
        grid: Shares to try, such as the papers' `np.arange(0, 1.005, 0.01)`. Where not given,
            the share is exact: the middle of the widest interval of best accuracy.
        start: "final" starts from the last network, as the papers do; "best" from early
            stopping's, below whose validation accuracy the fusion then never falls (anchored
            Knowledge Fusion).

    >>> probs = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.9, 0.1], [0.2, 0.8]]])
    >>> found = knowledge_fusion(RunRecord.from_arrays(probs, [0, 0]), window=0)
    >>> found.picks, found.weights.tolist()
    (((0, 0.875),), [0.875, 0.125])
    """
    if grid is not None and not (len(grid) and 0 <= grid.min() <= grid.max() <= 1):
        raise InputError(f"the grid of shares is {grid}; give shares from 0 to 1")
    probs, radius = _kept_probs(val), _window(val, window)
    correct = val.correct[val.kept]

    def propose(fused: Probs, right: Right) -> tuple[int, float, Probs]:
        row = int(forget_fraction(correct, right).argmax())
        candidate = _window_mean(probs, row, radius)
        if grid is not None:
            accuracy = [right_samples(_mix(fused, candidate, s), val.labels).mean() for s in grid]
            return row, float(grid[int(np.argmax(accuracy))]), candidate
        return row, best_share(*share_intervals(fused, candidate, val.labels))[0], candidate

    return _fuse_greedily(val, radius, max_picks, propose, start)


def exhaustive_fusion(
    val: RunRecord, *, window: int | None = None, max_picks: int | None = None
) -> Fusion:
    """As `knowledge_fusion`, but each pick is the best of all epochs at their exact best shares.

    It selects among many more candidates on the same samples, so it follows the noise of the
    validation half more closely; compare the two on other samples.
    """
    probs, radius = _kept_probs(val), _window(val, window)
    samples, labels = np.arange(len(val.labels))[:, None], val.labels

    def propose(fused: Probs, right: Right) -> tuple[int, float, Probs]:
        # An upper bound on the samples that an epoch can get right needs three classes: the label,
        # its strongest rival in the mix, the epoch's prediction. It rules out most epochs.
        rivals = fused.copy()
        rivals[samples[:, 0], labels] = -1
        strongest, bounds = rivals.argmax(axis=1), []
        for row, predicted in enumerate(val.predicted[val.kept]):
            entries = samples, np.stack([labels, strongest, predicted], axis=1)
            candidate = _window_mean(probs, row, radius, entries)
            ends = share_intervals(fused[entries], candidate, np.zeros_like(labels))
            bounds.append(best_share(*ends)[1])
        key, best = (-1, 0.0, 0), (0, 0.0, fused)
        for row in np.argsort(bounds)[::-1].tolist():
            if bounds[row] >= key[0]:
                candidate = _window_mean(probs, row, radius)
                share, count, width = best_share(*share_intervals(fused, candidate, labels))
                if (count, width, -row) > key:  # at a tie the widest interval, then the earliest
                    key, best = (count, width, -row), (row, share, candidate)
        return best

    return _fuse_greedily(val, radius, max_picks, propose)


def greedy_selection(val: RunRecord, size: int) -> Fusion:
    """Greedy selection with replacement (Caruana, Niculescu-Mizil, Crew and Ksikes, ICML 2004).

    Adds network after network, each the one that makes the mean of all chosen most accurate. A
    network may be added again, so that its weight is its count / size. Of the nested ensembles
    of 1, 2, ..., `size` networks the most accurate is returned, the smallest at a tie. Between
    networks that tie, the earliest is added.

    Args:
        val: The validation half of a run.
        size: Number of networks that are added.

    >>> probs = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]])
    >>> greedy_selection(RunRecord.from_arrays(probs, [0, 1]), size=4).weights.tolist()
    [0.5, 0.5]
    """
    refuse_test(val)
    if size < 1:
        raise InputError(f"size is {size}; allow 1 or more networks")
    probs = _to_float64(np.asarray(_kept_probs(val)))
    total = np.zeros(probs.shape[1:])
    chosen: list[int] = []
    right_counts: list[int] = []
    while len(chosen) < size:
        counts = [int(((total + p).argmax(axis=1) == val.labels).sum()) for p in probs]
        best = int(np.argmax(counts))
        chosen.append(best)
        right_counts.append(counts[best])
        total += probs[best]
    length = int(np.argmax(right_counts)) + 1
    return _over_kept(val, np.bincount(chosen[:length], minlength=len(probs)) / length)


def likelihood_weights(val: RunRecord) -> Fusion:
    """The weights that maximise the mixture's likelihood of the validation labels, by EM.

    Maximises L(w) = mean_n log sum_e w_e p_e(y_n | x_n), which is concave in w. At any w no
    other weights reach more than L(w) + max_e dL/dw_e - 1 (the tangent lies above L, and is
    largest at a single epoch): EM stops when at most 0.001 nats per sample are left to gain by
    this bound. Weights below 1e-4 are then dropped.

    >>> probs = np.array([[[0.8, 0.2], [0.8, 0.2]], [[0.2, 0.8], [0.2, 0.8]]])
    >>> likelihood_weights(RunRecord.from_arrays(probs, [0, 1])).weights.tolist()
    [0.5, 0.5]
    """
    refuse_test(val)
    probs = _kept_probs(val)
    likelihood = _to_float64(probs[:, np.arange(len(val.labels)), val.labels]).clip(_MIN_PROB)
    weights = np.full(len(probs), 1 / len(probs))
    while (step := em_step(weights, likelihood))[1] > _TOLERANCE:
        weights = step[0]
    weights = np.where(weights < min(_NEGLIGIBLE, weights.max()), 0.0, weights)
    return _over_kept(val, weights / weights.sum())


def right_samples(probs: Probs, labels: Int[np.ndarray, " samples"]) -> Right:
    """Mask of the samples that are classified correctly; ties go to the lowest class index."""
    return probs.argmax(axis=1) == labels


def share_intervals(
    fused: Float64[np.ndarray, "samples classes"],
    candidate: Float64[np.ndarray, "samples classes"],
    labels: Int[np.ndarray, " samples"],
) -> tuple[Float64[np.ndarray, " samples"], Float64[np.ndarray, " samples"]]:
    """The open interval (lo, hi) of shares at which each sample is classified correctly.

    With a_c = q_y - q_c and b_c = p_y - p_c, class y beats its rival c at share eps iff
    (1 - eps) a_c + eps b_c > 0: a half-line with its end at a_c / (a_c - b_c). The shares that
    beat every rival are therefore one interval; it is empty where lo >= hi. Of two classes that
    tie at every share the lower index wins, as it does for argmax.

    >>> q, p = np.array([[0.25, 0.75]]), np.array([[1.0, 0.0]])
    >>> [end.tolist() for end in share_intervals(q, p, np.array([0]))]
    [[0.3333333333333333], [1.0]]
    """
    samples, classes = np.arange(len(labels)), np.arange(fused.shape[1])
    fused_label = fused[samples, labels][:, None]
    candidate_label = candidate[samples, labels][:, None]
    ahead_before, ahead_after = fused > fused_label, candidate > candidate_label
    never = (fused >= fused_label) & (candidate >= candidate_label)
    never &= ahead_before | ahead_after | (classes < labels[:, None])
    feasible = ~never.any(axis=1)
    lo, hi = np.zeros(len(labels)), feasible.astype(np.float64)
    for end, ahead, tighten in ((lo, ahead_before, np.maximum), (hi, ahead_after, np.minimum)):
        sample, rival = np.nonzero(ahead & feasible[:, None])  # only these few need a division
        before = fused_label[sample, 0] - fused[sample, rival]
        after = candidate_label[sample, 0] - candidate[sample, rival]
        tighten.at(end, sample, before / (before - after))
    return lo, hi


def best_share(
    lo: Float64[np.ndarray, " samples"], hi: Float64[np.ndarray, " samples"]
) -> tuple[float, int, float]:
    """The middle of the widest interval of shares that most samples have between their lo and hi.

    Accuracy is an exact step function of the share, #{n: lo_n < eps < hi_n}, so that two sorts
    find its maximum. An interval as narrow as the rounding of its ends counts as empty.

    Returns:
        The share, the number of samples right at it, the width of its interval.

    >>> best_share(np.array([0.0, 0.25]), np.array([0.75, 1.0]))
    (0.5, 2, 0.5)
    """
    inside = hi - lo > _ROUNDING
    starts, stops = np.sort(lo[inside]), np.sort(hi[inside])
    steps = np.unique(np.concatenate([[0.0, 1.0], starts, stops]))
    begun = np.searchsorted(starts, steps[:-1], side="right")
    count = begun - np.searchsorted(stops, steps[:-1], side="right")
    width = np.diff(steps)
    count[width <= _ROUNDING] = -1
    widest = int(np.where(count == count.max(), width, -1.0).argmax())
    share = (steps[widest] + steps[widest + 1]) / 2
    return float(share), int(count[widest]), float(width[widest])


def em_step(
    weights: Float64[np.ndarray, " kept"], likelihood: Float64[np.ndarray, "kept samples"]
) -> tuple[Float64[np.ndarray, " kept"], float]:
    """One step of EM for the weights of a mixture whose components are fixed.

    w_e <- w_e g_e with g_e = mean_n p_e(n) / sum_k w_k p_k(n), the gradient of the mean
    log-likelihood (Dempster, Laird and Rubin, 1977).

    Args:
        weights: Not negative, of sum 1.
        likelihood: Probability p_e(n) that each component gives to each sample's label.

    Returns:
        The new weights, and max_e g_e - 1, a bound on what is left to gain, in nats per sample.

    >>> em_step(np.array([0.5, 0.5]), np.array([[0.75], [0.25]]))[0].tolist()
    [0.75, 0.25]
    """
    mixture = (weights[:, None] * likelihood).sum(axis=0)
    gradient = (likelihood / mixture).mean(axis=1)
    return weights * gradient, float(gradient.max()) - 1


def _fuse_greedily(
    val: RunRecord,
    window: int,
    max_picks: int | None,
    propose: Callable[[Probs, Right], tuple[int, float, Probs]],
    start: str = "final",
) -> Fusion:
    refuse_test(val)
    if start not in ("final", "best"):
        raise InputError(f'start is {start!r}; choose "final" or "best" (early stopping\'s epoch)')
    if max_picks is not None and max_picks < 1:
        raise InputError(f"max_picks is {max_picks}; allow 1 or more, or none for no limit")
    weights = (early_stopping(val) if start == "best" else single(val)).weights
    fused = fuse(val, Fusion(weights))
    right = right_samples(fused, val.labels)
    picks: list[tuple[int, float]] = []
    while max_picks is None or len(picks) < max_picks:
        row, share, candidate = propose(fused, right)
        mixed = _mix(fused, candidate, share)
        now_right = right_samples(mixed, val.labels)
        if now_right.sum() <= right.sum():
            break
        fused, right = mixed, now_right
        chosen = val.kept[_clip_window(row, window)]
        weights = (1 - share) * weights
        weights[chosen] += share / len(chosen)
        picks.append((int(val.kept[row]), share))
    return Fusion(weights, tuple(picks), window)


def _window(val: RunRecord, window: int | None) -> int:
    most = (len(val.kept) - 1) // 2
    if window is None:
        return min(1, most)
    if not 0 <= window <= most:
        raise InputError(f"window is {window} with {len(val.kept)} kept epochs; allow 0 to {most}")
    return window


def _clip_window(row: int, window: int) -> slice:
    return slice(max(0, row - window), row + window + 1)


def _window_mean(
    probs: np.ndarray | Columns,
    row: int,
    window: int,
    entries: slice | tuple[np.ndarray, ...] = slice(None),
) -> Probs:
    members = probs[_clip_window(row, window)]
    total = _to_float64(members[0][entries])
    for member in members[1:]:
        total += _to_float64(member[entries])
    total /= len(members)
    return total


def _mix(fused: Probs, candidate: Probs, share: float) -> Probs:
    return (1 - share) * fused + share * candidate


def _kept_probs(record: RunRecord) -> np.ndarray | Columns:
    if record.probs is None:
        raise InputError("this record holds no probabilities; load the run's own folder")
    return record.probs


def _to_float64(values: np.ndarray) -> np.ndarray:
    # A table turns float16 into float64 three times as fast as numpy, which is slow at numbers
    # near 0, and softmax makes many.
    if values.dtype == np.float16:
        return _HALVES[values.view(np.uint16).astype(np.intp)]
    return values.astype(np.float64)


def _enough(record: RunRecord, networks: int) -> int:
    kept = len(record.kept)
    if not 1 <= networks <= kept:
        raise InputError(f"{networks} networks of {kept} kept epochs; allow 1 to {kept}")
    return kept


def _uniform_over(record: RunRecord, rows: range | list[int]) -> Fusion:
    weights = np.zeros(len(record.kept))
    weights[list(rows)] = 1 / len(rows)
    return _over_kept(record, weights)


def _over_kept(record: RunRecord, weights: Float64[np.ndarray, " kept"]) -> Fusion:
    epoch_weights = np.zeros(record.epochs)
    epoch_weights[record.kept] = weights
    return Fusion(epoch_weights)
