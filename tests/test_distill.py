import dataclasses
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fmnlib import InputError, RunConfig, runs
from fmnlib.checkpoint import checkpoint_path, load_tensors
from fmnlib.config import Paused
from fmnlib.data import Batch, load
from fmnlib.distillation import (
    Member,
    average,
    corrected_config,
    distill,
    load_network,
    members_of,
    student_config,
    teacher_criterion,
    train_corrected,
    with_view_pool,
)
from fmnlib.fusion import Fusion, knowledge_fusion
from fmnlib.models import average_weights
from fmnlib.noise import confused_with, estimated_matrix
from fmnlib.training import predict, train

SMALL = RunConfig(noise="symmetric", noise_rate=0.4, train_samples=200, eval_samples=200, epochs=4)


@pytest.fixture
def trained(tmp_path):
    record = train(SMALL, tmp_path / "run", device="cpu", progress=False)
    fusion = Fusion(np.array([0.5, 0.0, 0.25, 0.25]))
    return tmp_path / "run", record, fusion


def test_the_loss_is_hintons(trained):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)
    config = student_config(SMALL, "kf", members, temperature=3.0, soft_share=0.7)
    data = load(config)
    teacher = [(load_network(member, data), member.weight) for member in members]
    index = torch.tensor([3, 14, 15])
    images = data.normalize(data.images[index])
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    probs = sum(weight * net(images).softmax(1) for net, weight in teacher)
    labels = data.labels[index]
    expected = []
    for n in range(3):
        soft = probs[n] ** (1 / 3)
        soft = soft / soft.sum()
        cross = -(soft * torch.log_softmax(logits[n] / 3, 0)).sum()
        expected.append(0.7 * 9 * cross + 0.3 * F.cross_entropy(logits[n], labels[n]))
    for augment in ("none", "crop"):  # a table of the teacher's outputs, or the view itself
        shown = dataclasses.replace(config, augment=augment)
        batch = Batch(images, index, torch.zeros(3, dtype=torch.long))
        loss = teacher_criterion(shown, data, teacher)(logits, batch)
        torch.testing.assert_close(loss, torch.stack(expected))


def test_a_student_of_the_fusion_beats_its_run(tmp_path):
    long = dataclasses.replace(SMALL, epochs=30, train_samples=0, eval_samples=0)
    record = train(long, tmp_path / "long", device="cpu", progress=False)
    val, test = record.split(0)
    found = knowledge_fusion(val)
    members = members_of(long, tmp_path / "long", found)
    config = student_config(long, "kf", members)
    student = distill(config, members, tmp_path / "student", device="cpu", progress=False)
    assert student.split(0)[1].accuracy[-1] > test.accuracy[-1] + 0.05
    assert student.probs.shape[0] == 1
    assert student.config.id != long.id
    shutil.rmtree(tmp_path / "long")  # what is done needs no teacher
    again = distill(config, members, tmp_path / "student", device="cpu", progress=False)
    assert np.array_equal(again.probs, student.probs)
    (tmp_path / "student" / "labels.sha256").write_text("others")
    with pytest.raises(InputError, match="was trained on other labels than its settings give"):
        distill(config, members, tmp_path / "student", device="cpu", progress=False)


def test_a_student_can_start_from_its_heaviest_teacher(trained, tmp_path):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)
    start = student_config(SMALL, "kf", members, init="teacher")
    config = dataclasses.replace(start, lr=0.0, epochs=1)
    distill(config, members, tmp_path / "student", device="cpu", progress=False)
    student = load_tensors(checkpoint_path(tmp_path / "student", 0))
    heaviest = load_tensors(checkpoint_path(folder, 0))
    torch.testing.assert_close(student["0.weight"], heaviest["0.weight"])


def test_averaged_weights_have_their_own_batchnorm(trained, tmp_path):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)
    config = student_config(SMALL, "averaged_kf", members)
    record = average(config, members, tmp_path / "mean", device="cpu")
    state = load_tensors(checkpoint_path(tmp_path / "mean", 0))
    plain = average_weights(
        (load_tensors(checkpoint_path(folder, m.epoch)), m.weight) for m in members
    )
    torch.testing.assert_close(state["0.weight"], plain["0.weight"])
    assert not torch.allclose(state["1.running_mean"], plain["1.running_mean"])
    data = load(SMALL)
    net = load_network(dataclasses.replace(members[0], folder=tmp_path / "mean", epoch=0), data)
    probs = predict(net, data, data.eval_images).softmax(1)
    np.testing.assert_allclose(record.probs[0], probs, atol=1e-3)


def test_a_teacher_weighs_one(trained, tmp_path):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)[:2]
    with pytest.raises(InputError, match="the teacher's 2 networks sum to 0.75; make it 1"):
        distill(student_config(SMALL, "kf", members), members, tmp_path, device="cpu")


def test_a_teacher_is_named_by_its_weights(trained):
    folder, _, mix = trained
    one = student_config(SMALL, "kf", members_of(SMALL, folder, mix))
    other = student_config(SMALL, "kf", members_of(SMALL, folder, Fusion(np.full(4, 0.25))))
    assert one.id != other.id
    with pytest.raises(InputError, match="in a plain run; students: `fmn distill`"):
        train(one, runs.folder(one))


def test_views_predicted_in_advance_are_those_that_the_student_sees(trained):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)
    few = student_config(SMALL, "kf", members, teacher_views=3)
    config = dataclasses.replace(few, augment="crop_flip")
    plain = load(config)
    data = with_view_pool(config, plain)
    teacher = [(load_network(member, data), member.weight) for member in members]
    in_advance, anew = (teacher_criterion(config, of, teacher) for of in (data, plain))
    seen = set()
    for seed in range(6):
        for index in torch.randperm(200)[:50].split(25):
            [batch] = data.batches([index], config.augment, seed)
            seen |= {(int(i), image.numpy().tobytes()) for i, image in zip(index, batch.images)}
            logits = torch.randn(25, 10)
            torch.testing.assert_close(in_advance(logits, batch), anew(logits, batch))
    views_of = [sum(i == sample for i, _ in seen) for sample in range(200)]
    assert max(views_of) in (2, 3)


def test_a_student_of_few_views_learns(trained, tmp_path):
    folder, record, mix = trained
    members = members_of(SMALL, folder, mix)
    few = student_config(SMALL, "kf", members, teacher_views=4)
    config = dataclasses.replace(few, augment="crop", epochs=8)
    student = distill(config, members, tmp_path / "student", device="cpu", progress=False)
    assert student.accuracy[-1] > record.accuracy[-1] - 0.1


def corrected(job, folder):
    return job.make(job.config, job.members, folder, device="cpu")


def test_a_run_that_is_corrected_for_its_noise_reads_through_a_known_confusion(tmp_path):
    """With the true matrix of asymmetric noise most confused samples come back."""
    noisy = RunConfig(noise="asymmetric", noise_rate=0.4, epochs=12)
    matrix = np.eye(10)
    for source, target in confused_with("digits", 10).items():
        matrix[source, [source, target]] = 0.6, 0.4
    config = corrected_config(noisy, matrix)
    record = train_corrected(config, (), tmp_path / "glc", matrix=matrix, device="cpu")
    plain = train(noisy, tmp_path / "plain", device="cpu", progress=False)
    assert record.accuracy[-1] > plain.accuracy[-1] + 0.05
    assert len(record.kept) == 12  # it can be fused like any other


def test_a_corrected_run_and_its_student_are_made_in_one_call(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("FMN_RUNS", str(tmp_path))
    job = runs.corrected(SMALL, trained[1].split(0)[0])
    student = runs.student(job.config, "kf", Fusion(np.array([0.5, 0.0, 0.0, 0.5])))
    made = runs.obtain([job, student], workers=1, progress=False)
    assert [record.config for record in made] == [job.config, student.config]


def test_a_corrected_run_is_named_by_its_matrix(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("FMN_RUNS", str(tmp_path))
    _, record, _ = trained
    val, _ = record.split(0)
    job = runs.corrected(SMALL, val)
    matrix = estimated_matrix(val)
    assert job.config == corrected_config(SMALL, matrix)
    [record] = runs.obtain([job], workers=1, progress=False)
    assert (record.config, len(record.kept)) == (job.config, 4)
    assert not runs.complete(SMALL)  # nothing of it is needed
    with pytest.raises(Paused, match="paused after 1 of 4 epochs"):
        train_corrected(job.config, (), tmp_path / "late", matrix=matrix, deadline=0.0)
    half = corrected_config(SMALL, matrix / 2)
    with pytest.raises(InputError, match="a row of the noise matrix is negative or does not sum"):
        train_corrected(half, (), tmp_path / "half", matrix=matrix / 2)
    other = matrix[::-1]
    assert corrected_config(SMALL, other).id != job.config.id
    with pytest.raises(InputError, match="the noise matrix is glc-.* and the run glc-"):
        train_corrected(job.config, (), tmp_path, matrix=other)
    with pytest.raises(InputError, match="and the run plain; make the config with corrected_"):
        train_corrected(SMALL, (), tmp_path, matrix=other)
    small = np.eye(3)
    with pytest.raises(InputError, match="the noise matrix is 3 x 3; give 10 x 10"):
        train_corrected(corrected_config(SMALL, small), (), tmp_path / "x", matrix=small)
    assert not (tmp_path / "x").exists()


def test_a_corrected_run_that_is_stopped_goes_on_with_the_same_bits(trained, tmp_path, dying):
    job = runs.corrected(SMALL, trained[1].split(0)[0])
    whole = corrected(job, tmp_path / "whole")
    with dying():
        corrected(job, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "record.npz").exists()
    np.testing.assert_array_equal(whole.probs, corrected(job, tmp_path / "stopped").probs)


def test_loading_a_network_draws_nothing(tmp_path):
    config = RunConfig(train_samples=50, eval_samples=20, epochs=1)
    train(config, tmp_path, device="cpu", progress=False)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_network(Member(config, tmp_path, 0, 1.0), load(config))
    assert torch.equal(torch.rand(1), expected)


def test_batchnorm_is_estimated_on_batches_of_one_size(tmp_path):
    config = RunConfig(dataset="wave", epochs=3, train_samples=501)
    record = train(config, tmp_path / "run", device="cpu", progress=False)
    members = [Member(config, tmp_path / "run", 2, 1.0)]
    mean = average(student_config(config, "kf", members), members, tmp_path / "mean", device="cpu")
    assert mean.accuracy[0] > record.accuracy[-1] - 0.02
