import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fmnlib import InputError, RunConfig
from fmnlib.fusion import Fusion
from fmnlib.search import knowledge_fusion
from fmnlib.study import runs
from fmnlib.training.checkpoint import checkpoint_path, load_tensors
from fmnlib.training.data import load
from fmnlib.training.distill import (
    _bank,
    _criterion,
    average,
    distill,
    load_network,
    members_of,
    student_config,
)
from fmnlib.training.models import average_weights
from fmnlib.training.train import predict, train

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
        loss = _criterion(shown, data, teacher)(logits, images, index)
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


def test_a_student_can_start_from_its_heaviest_teacher(trained, tmp_path):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)
    config = dataclasses.replace(
        student_config(SMALL, "kf", members), init="teacher", lr=0.0, epochs=1
    )
    distill(config, members, tmp_path / "student", device="cpu", progress=False)
    student = load_tensors(checkpoint_path(tmp_path / "student", 0))[0]
    heaviest = load_tensors(checkpoint_path(folder, 0))[0]
    torch.testing.assert_close(student["0.weight"], heaviest["0.weight"])


def test_averaged_weights_have_their_own_batchnorm(trained, tmp_path):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)
    config = student_config(SMALL, "averaged_kf", members)
    record = average(config, members, tmp_path / "mean", device="cpu")
    state = load_tensors(checkpoint_path(tmp_path / "mean", 0))[0]
    plain = average_weights(
        (load_tensors(checkpoint_path(folder, m.epoch))[0], m.weight) for m in members
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


def test_views_that_are_scored_beforehand_are_those_that_the_student_sees(trained):
    folder, _, mix = trained
    members = members_of(SMALL, folder, mix)
    config = dataclasses.replace(
        student_config(SMALL, "kf", members), augment="crop_flip", teacher_views=3
    )
    plain = load(config)
    data = dataclasses.replace(plain, bank=_bank(config, plain))
    teacher = [(load_network(member, data), member.weight) for member in members]
    beforehand, fresh = _criterion(config, data, teacher), _criterion(config, plain, teacher)
    seen = set()
    for seed in range(6):
        for index in torch.randperm(200)[:50].split(25):
            [images] = data.views([index], config.augment, seed)
            seen |= {(int(i), image.numpy().tobytes()) for i, image in zip(index, images)}
            logits = torch.randn(25, 10)
            torch.testing.assert_close(
                beforehand(logits, images, index), fresh(logits, images, index)
            )
    views_of = [sum(i == sample for i, _ in seen) for sample in range(200)]
    assert max(views_of) in (2, 3)


def test_a_student_of_few_views_learns(trained, tmp_path):
    folder, record, mix = trained
    members = members_of(SMALL, folder, mix)
    config = dataclasses.replace(
        student_config(SMALL, "kf", members), augment="crop", teacher_views=4, epochs=8
    )
    student = distill(config, members, tmp_path / "student", device="cpu", progress=False)
    assert student.accuracy[-1] > record.accuracy[-1] - 0.1
