import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fmnlib import InputError, RunConfig
from fmnlib.data import load
from fmnlib.noise import confused_with
from fmnlib.record import halves


def reference_crop(image, row, column, mirror, pad):
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    side = image.shape[-1]
    cut = padded[:, row : row + side, column : column + side]
    return cut[:, :, ::-1] if mirror else cut


def test_digits_are_real_shuffled_once_and_disjoint():
    data = load(RunConfig())
    assert data.images.shape == (1000, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert data.eval_images.shape == (797, 1, 8, 8)
    assert sorted(set(data.labels.tolist())) == list(range(10))
    together = {image.numpy().tobytes() for image in torch.cat([data.images, data.eval_images])}
    assert len(together) == 1797
    assert torch.equal(data.images, load(RunConfig(seed=5, noise_seed=7)).images)


def test_normalised_images_have_mean_0_and_deviation_1():
    data = load(RunConfig())
    images = data.normalize(data.images)
    assert images.mean().abs() < 1e-5
    assert abs(images.std(unbiased=False) - 1) < 1e-5
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmented_images_are_shifts_of_the_originals(augment):
    data = load(RunConfig())
    index = torch.arange(200)
    [batch] = data.batches([index], augment, seed=0)
    out = batch.images
    seen = set()
    for n in range(200):
        image = data.images[n].numpy()
        for mirror in (False, True) if augment == "crop_flip" else (False,):
            for row in range(3):
                for column in range(3):
                    cut = reference_crop(image, row, column, mirror, 1).copy()
                    if torch.allclose(out[n], data.normalize(torch.from_numpy(cut)[None])[0]):
                        seen.add((n, row, column, mirror))
    assert {n for n, *_ in seen} == set(range(200))
    assert len({place for _, *place in map(lambda s: (s[0], s[1:]), seen) for place in place}) == (
        18 if augment == "crop_flip" else 9
    )


def test_a_view_depends_on_seed_and_sample_not_on_the_batch():
    data = load(RunConfig())
    order = torch.randperm(1000)

    def images(order, size, seed):
        batches = data.batches(order.split(size), "crop_flip", seed)
        return torch.cat([batch.images for batch in batches])

    whole, other = images(torch.arange(1000), 64, 3), images(order, 100, 3)
    assert torch.equal(whole[order], other)
    assert not torch.equal(whole, images(torch.arange(1000), 1000, 4))


def test_noise_flips_training_labels_alone():
    clean, noisy = load(RunConfig()), load(RunConfig(noise="symmetric", noise_rate=0.4))
    assert noisy.flipped.sum() == 400
    assert torch.equal(noisy.flipped, clean.labels != noisy.labels)
    assert torch.equal(clean.eval_labels, noisy.eval_labels)


def test_a_part_of_the_samples_has_the_same_images_and_the_exact_rate():
    whole = load(RunConfig())
    part = load(RunConfig(noise="symmetric", noise_rate=0.4, train_samples=300, eval_samples=99))
    labels = {image.numpy().tobytes(): int(y) for image, y in zip(whole.images, whole.labels)}
    right = [labels[image.numpy().tobytes()] == y for image, y in zip(part.images, part.labels)]
    assert len(part.eval_images) == 99
    assert (len(right), sum(right)) == (300, 180)
    assert right == (~part.flipped).tolist()


def test_cifar100_confuses_inside_superclasses_in_cycles():
    mapping = confused_with("cifar100", 100)
    assert sorted(mapping) == sorted(mapping.values()) == list(range(100))
    for start in mapping:
        cycle = [start]
        while mapping[cycle[-1]] != start:
            cycle.append(mapping[cycle[-1]])
        assert len(cycle) == 5
    assert confused_with("folder:somewhere", 3) == {0: 1, 1: 2, 2: 0}


def test_superclasses_and_human_labels_are_those_of_the_real_cifar100(real_data):
    with np.load(real_data / "cifar100n" / "cifar100n_human.npz") as stored:
        fine, coarse = stored["clean_label"], stored["clean_coarse_label"]
    superclass = dict(zip(fine.tolist(), coarse.tolist()))
    assert all(superclass[a] == superclass[b] for a, b in confused_with("cifar100", 100).items())
    data = load(RunConfig(dataset="cifar100", noise="human"))
    assert round(data.flipped.float().mean().item(), 3) == 0.402
    assert data.images.shape == (50_000, 3, 32, 32)
    np.testing.assert_allclose(data.mean, [0.5071, 0.4865, 0.4409], atol=1e-4)
    np.testing.assert_allclose(data.std, [0.2673, 0.2564, 0.2762], atol=1e-4)


def test_matrix_noise_is_read_from_a_file(tmp_path):
    file = tmp_path / "swap.csv"
    np.savetxt(file, np.roll(np.eye(10), 1, axis=1), delimiter=",")
    clean, noisy = load(RunConfig()), load(RunConfig(noise=f"matrix:{file}"))
    assert torch.equal(noisy.labels, (clean.labels + 1) % 10)


@pytest.mark.parametrize("shape", [(12, 12), (10, 12)])
def test_a_noise_matrix_has_a_row_and_a_column_for_each_class(tmp_path, shape):
    np.savetxt(tmp_path / "m.csv", np.eye(*shape), delimiter=",")
    with pytest.raises(InputError, match=rf"is {shape[0]} x {shape[1]}; give 10 x 10"):
        load(RunConfig(noise=f"matrix:{tmp_path}/m.csv"))


def test_a_damaged_image_and_a_damaged_data_set_are_named(tmp_path, monkeypatch, real_data):
    root = image_folder(tmp_path / "pets")
    image = root / "test" / "dog" / "3.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(InputError, match=r"dog/3\.png cannot be read as an image .*; fix it"):
        load(RunConfig(dataset=f"folder:{root}"))
    shutil.copytree(real_data / "fashionmnist", tmp_path / "fashionmnist")
    for file in (tmp_path / "fashionmnist").rglob("*ubyte"):
        file.write_bytes(file.read_bytes()[:1000])
    monkeypatch.setenv("FMN_DATA", str(tmp_path))
    with pytest.raises(InputError, match="FashionMNIST in .* is damaged .*; move it away and run"):
        load(RunConfig(dataset="fashion_mnist"))


def image_folder(root, classes=("cat", "dog"), count=6):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{n}.png")
    return root


def test_a_folder_of_images_is_cut_square_and_resized(tmp_path):
    root = image_folder(tmp_path / "pets")
    data = load(RunConfig(dataset=f"folder:{root}", image_size=16))
    assert data.images.shape == (12, 3, 16, 16)
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    assert data.classes == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset": "cifar11"}, "dataset is 'cifar11'; known are digits, mnist"),
        ({"dataset": "cifar10"}, "CIFAR10 was not found in .*; run `fmn download cifar10`"),
        ({"dataset": "folder:/nowhere"}, "/nowhere must hold train/CLASS/"),
        ({"train_samples": 1001}, "1001 samples are wanted of 1000"),
        ({"noise": "human"}, "human noise is of cifar100"),
        ({"noise": "matrix:/nowhere.csv"}, "noise matrix /nowhere.csv"),
    ],
)
def test_bad_data_is_told_in_one_line(changes, told, monkeypatch, tmp_path):
    monkeypatch.setenv("FMN_DATA", str(tmp_path))
    with pytest.raises(InputError, match=told) as error:
        load(dataclasses.replace(RunConfig(), **changes))
    assert "\n" not in str(error.value)


def test_classes_of_a_folder_must_agree(tmp_path):
    root = image_folder(tmp_path)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(InputError, match=r"test/CLASS/ \(or val/\) of the same classes"):
        load(RunConfig(dataset=f"folder:{root}"))


@pytest.mark.parametrize(("part", "told"), [("all", r"\(all"), ("first_half", r"\(first_h")])
def test_one_class_is_refused_before_the_training(tmp_path, part, told):
    root = image_folder(tmp_path)
    for split in ("train", "test") if part == "all" else ():
        shutil.rmtree(root / split / "dog")
    with pytest.raises(InputError, match=f"has one class {told}.*; give two or more"):
        load(RunConfig(dataset=f"folder:{root}", classes=part))


def test_the_validation_half_can_train_as_well_or_alone():
    run = RunConfig(noise="symmetric", noise_rate=0.4)
    noisy = load(run)
    added = load(dataclasses.replace(run, validation_half="added:3"))
    alone = load(dataclasses.replace(run, validation_half="alone:3"))
    val, test = halves(len(noisy.eval_labels), 3)
    assert torch.equal(alone.images, noisy.eval_images[val])
    assert torch.equal(alone.labels, noisy.eval_labels[val])
    assert not alone.flipped.any()
    assert torch.equal(added.images, torch.cat([noisy.images, alone.images]))
    assert torch.equal(added.labels, torch.cat([noisy.labels, alone.labels]))
    assert torch.equal(added.flipped, torch.cat([noisy.flipped, alone.flipped]))
    assert torch.equal(added.eval_images, noisy.eval_images)
    assert len(test) == len(noisy.eval_labels) - len(val)


def test_a_half_that_is_held_out_brings_its_wrong_labels():
    noisy = RunConfig(noise="symmetric", noise_rate=0.4)
    some = dataclasses.replace(noisy, evaluate="heldout", train_samples=800)
    alone = load(dataclasses.replace(some, validation_half="alone:0"))
    assert len(alone.labels) == 100
    true = {
        image.numpy().tobytes(): y
        for image, y in zip(load(RunConfig()).images, load(RunConfig()).labels, strict=True)
    }
    wrong = [
        true[image.numpy().tobytes()] != y
        for image, y in zip(alone.images, alone.labels, strict=True)
    ]
    assert 20 < sum(wrong) < 60
    assert alone.flipped.tolist() == wrong
