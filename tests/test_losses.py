"""fmnlib.losses: every loss is its equation, worked out by numpy in double precision."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fmnlib import InputError, RunConfig
from fmnlib.config import LOSSES
from fmnlib.data import load
from fmnlib.distillation import Member, student_config
from fmnlib.losses import (
    begin_epoch,
    forward_corrected,
    new_memory,
    parameters,
    sample_losses,
)
from fmnlib.training import build_model, train

LABELS = torch.tensor([1, 2, 1, 0])  # of the training samples
INDEX = torch.tensor([3, 1])  # of the batch, whose labels are 0 and 2
FIRST = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
SECOND = torch.tensor([[0.3, 1.2, -0.7], [9.0, -14.0, 1.0]])
ROBUST = [name for name in LOSSES if name != "cross_entropy"]
WITH_MEMORY = ["elr", "sat", "ps_kd"]


def softmax(logits):
    powers = np.exp(logits.double().numpy())
    return powers / powers.sum(1, keepdims=True)


def steps(config, batches, epochs=None):
    """Losses of a batch at a time, gradients of their mean, and the targets after the last."""
    memory = new_memory(config, LABELS, classes=3)
    results = []
    for epoch, batch in zip(epochs or range(len(batches)), batches):
        if memory is not None:
            begin_epoch(config, memory, epoch)
        logits = batch.clone().requires_grad_()
        losses = sample_losses(config, logits, LABELS[INDEX], INDEX, memory)
        results.append((losses.detach(), *torch.autograd.grad(losses.mean(), logits)))
    return results, None if memory is None else memory.targets


def own(probs):
    """The probability of each sample's label."""
    return probs[[0, 1], [0, 2]]


@pytest.mark.parametrize("q", [0.01, 0.7, 1.0])
def test_generalized_cross_entropy(q):
    [(losses, _)], _ = steps(RunConfig(loss="gce", loss_parameters=(q,)), [FIRST])
    np.testing.assert_allclose(losses, (1 - own(softmax(FIRST)) ** q) / q, rtol=2e-5)


def test_symmetric_cross_entropy():
    [(losses, _)], _ = steps(RunConfig(loss="sce", loss_parameters=(6.0, 0.1)), [FIRST])
    probs = softmax(FIRST)
    log_labels = np.array([[0.0, -4, -4], [-4, -4, 0]])
    expected = -6 * np.log(own(probs)) - 0.1 * (probs * log_labels).sum(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_early_learning_regularisation_twice():
    results, targets = steps(RunConfig(loss="elr", loss_parameters=(7.0, 0.9)), [FIRST, SECOND])
    expected = np.zeros((2, 3))
    for logits, (losses, _) in zip([FIRST, SECOND], results):
        probs = softmax(logits)
        clamped = probs.clip(1e-4, 1 - 1e-4)
        expected = 0.9 * expected + 0.1 * clamped / clamped.sum(1, keepdims=True)
        agreement = (expected * clamped).sum(1)
        by_hand = -np.log(own(probs)) + 7 * np.log(1 - agreement)
        np.testing.assert_allclose(losses, by_hand, rtol=1e-5)
    np.testing.assert_allclose(targets[INDEX], expected, rtol=1e-5)
    assert (targets[[0, 2]] == 0).all()  # not in the batch


def test_early_learning_regularisation_is_that_of_others():
    """Reference: KlemenVovk/noisy-labels (MIT), ELR/utils.py, run on the same two batches.

    The authors' own code, shengliu66/ELR, has the same lines.
    """
    config = RunConfig(loss="elr", loss_parameters=(3.0, 0.7))
    results, targets = steps(config, [FIRST, SECOND])
    np.testing.assert_allclose([r[0].mean() for r in results], [1.8521947, 3.7824214], rtol=1e-6)
    gradients = [
        [[-0.16699153, 0.03289725, 0.13409428], [0.04826302, 0.44504526, -0.49330825]],
        [[-0.39104193, 0.31896997, 0.07207192], [0.49960777, 0.0, -0.49960774]],
    ]
    for (_, gradient), reference in zip(results, gradients):
        np.testing.assert_allclose(gradient, reference, atol=1e-6)
    reference = [[0.24335589, 0.20099859, 0.06564556], [0.30976534, 0.19879481, 0.00143986]]
    np.testing.assert_allclose(targets[INDEX], reference, rtol=1e-5)


def test_self_adaptive_training_before_and_after_its_start():
    config = RunConfig(loss="sat", loss_parameters=(0.8, 0.5), epochs=4)
    results, targets = steps(config, [FIRST, FIRST, FIRST, SECOND])
    for losses, _ in results[:2]:
        np.testing.assert_allclose(losses, -np.log(own(softmax(FIRST))), rtol=1e-5)
    expected = np.array([[1.0, 0, 0], [0, 0, 1]])
    for logits, (losses, _) in zip([FIRST, SECOND], results[2:]):
        probs = softmax(logits)
        expected = 0.8 * expected + 0.2 * probs
        weights = expected.max(1) / expected.max(1).mean()
        by_hand = -weights * (expected * np.log(probs)).sum(1)
        np.testing.assert_allclose(losses, by_hand, rtol=1e-5)
    np.testing.assert_allclose(targets[INDEX], expected, rtol=1e-5)
    np.testing.assert_array_equal(targets[[0, 2]], [[0, 1, 0], [0, 1, 0]])


def test_self_adaptive_training_is_that_of_its_authors():
    """Reference: LayneH/self-adaptive-training, losses/loss.py, run on the same batches."""
    config = RunConfig(loss="sat", loss_parameters=(0.9, 1 / 3), epochs=3)
    results, targets = steps(config, [FIRST, FIRST, SECOND])
    means = [2.6481483, 2.3368199, 4.6755629]
    np.testing.assert_allclose([r[0].mean() for r in results], means, rtol=1e-6)
    reference = [[-0.34086561, 0.30352047, 0.03734512], [0.42264360, -0.04020613, -0.38243747]]
    np.testing.assert_allclose(results[-1][1], reference, atol=1e-6)
    reference = [[0.90683055, 0.06778177, 0.02538766], [0.10420758, 0.08518492, 0.81060749]]
    np.testing.assert_allclose(targets[INDEX], reference, rtol=1e-5)


def test_progressive_self_distillation_sees_the_epoch_before():
    config = RunConfig(loss="ps_kd", loss_parameters=(0.6,), epochs=3)
    results, targets = steps(config, [FIRST, SECOND, FIRST])
    labels = np.array([[1.0, 0, 0], [0, 0, 1]])
    before = labels
    for epoch, (logits, (losses, gradient)) in enumerate(zip([FIRST, SECOND, FIRST], results)):
        share = 0.6 * (epoch + 1) / 3
        probs = softmax(logits)
        target = (1 - share) * labels + share * before
        np.testing.assert_allclose(losses, -(target * np.log(probs)).sum(1), rtol=1e-5)
        np.testing.assert_allclose(gradient, (probs - target) / 2, atol=1e-6)
        before = probs
    np.testing.assert_allclose(targets[INDEX], before, rtol=1e-5)


def test_the_corrected_loss_sums_over_the_classes_that_a_label_may_come_from():
    matrix = np.array([[0.6, 0.4, 0.0], [0.1, 0.7, 0.2], [0.3, 0.0, 0.7]])
    logits = FIRST.clone().requires_grad_()
    losses = forward_corrected(logits, LABELS[INDEX], torch.tensor(matrix, dtype=torch.float32))
    probs = softmax(FIRST)
    first = probs[0, 0] * 0.6 + probs[0, 1] * 0.1 + probs[0, 2] * 0.3  # given 0
    second = probs[1, 1] * 0.2 + probs[1, 2] * 0.7  # given 2, which class 0 never is
    np.testing.assert_allclose(losses.detach(), [-np.log(first), -np.log(second)], rtol=1e-5)
    losses.sum().backward()
    come_from = probs * matrix[:, [0, 2]].T
    come_from /= come_from.sum(1, keepdims=True)  # P(class | given), by Bayes' rule
    np.testing.assert_allclose(logits.grad, probs - come_from, atol=1e-6)
    for scale in (1e3, 1e5):
        logits = (scale * FIRST).requires_grad_()
        forward_corrected(logits, LABELS[INDEX], torch.eye(3)).sum().backward()
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", ROBUST)
def test_losses_and_gradients_are_finite_at_extremes(loss):
    """Certain and right, certain and wrong, and logits of a network that diverges."""
    right = torch.tensor([[80.0, -80, -80], [-80, -80, 80]])
    batches = [right, -right, right, 1e4 * right, -1e4 * right, torch.zeros(2, 3)]
    results, targets = steps(RunConfig(loss=loss, epochs=6), batches)
    for losses, gradient in results:
        assert torch.isfinite(losses).all()
        assert torch.isfinite(gradient).all()
    if targets is not None:
        assert ((targets >= 0) & (targets <= 1)).all()


def test_parameters_are_the_papers_where_not_given():
    assert parameters(RunConfig(loss="sce")) == (0.1, 1.0)
    assert parameters(RunConfig(loss="sce", loss_parameters=(6.0, 0.1))) == (6.0, 0.1)
    given = RunConfig(loss="gce", loss_parameters=(0.7,))
    assert given == RunConfig(loss="gce")
    assert given.id == RunConfig(loss="gce").id
    assert given.changes() == {"loss": "gce"}
    whole = RunConfig.from_dict({"loss": "elr", "loss_parameters": [7, 0.9]})
    assert whole == RunConfig(loss="elr", loss_parameters=(7.0, 0.9))
    assert "-clean-elr-s0-" in whole.id


@pytest.mark.parametrize("loss", ROBUST)
def test_a_run_learns_with_every_loss_and_records_cross_entropy(tmp_path, loss):
    config = RunConfig(loss=loss, model="mlp", epochs=6, noise="symmetric", noise_rate=0.2)
    record = train(config, tmp_path, device="cpu", progress=False)
    assert record.accuracy[-1] > 0.85
    assert (record.loss_histogram.sum(axis=(1, 2)) == 1000).all()  # none is negative


def test_a_step_of_a_run_is_that_of_its_loss(tmp_path):
    """One step of SGD from the same weights, with a learning rate that hides nothing else."""
    config = RunConfig(
        loss="elr", model="mlp", epochs=1, train_samples=64, schedule="constant", momentum=0.0,
        nesterov=False, weight_decay=0.0, lr=0.5, precision="float32",
    )  # fmt: skip
    data = load(config)
    model = build_model(config, data)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    logits = model.train()(data.normalize(data.images[order]))
    memory = new_memory(config, data.labels, data.classes)
    sample_losses(config, logits, data.labels[order], order, memory).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    expected = model.eval()(data.normalize(data.eval_images)).softmax(1).detach()
    record = train(config, tmp_path, device="cpu", progress=False)
    np.testing.assert_allclose(record.probs[0], expected, atol=1e-3)


def test_a_loss_beside_a_criterion_is_refused(tmp_path):
    with pytest.raises(InputError, match="loss is 'gce' beside a criterion; leave one of them"):
        train(RunConfig(loss="gce"), tmp_path, criterion=lambda logits, batch: logits.sum(1))
    assert not list(tmp_path.iterdir())


def test_a_student_of_such_a_run_has_the_loss_of_students():
    config = RunConfig(loss="elr", loss_parameters=(7.0, 0.9))
    student = student_config(config, "kf", [Member(config, Path("run"), 3, 1.0)])
    assert (student.loss, student.loss_parameters) == ("cross_entropy", ())
    plain = dataclasses.replace(config, loss="cross_entropy", loss_parameters=())
    other = student_config(plain, "kf", [Member(plain, Path("run"), 3, 1.0)])
    assert student.teacher != other.teacher  # the teacher's digest names its loss
