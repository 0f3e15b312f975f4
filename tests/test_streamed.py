import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from fmnlib import InputError
from fmnlib.training.streamed import AUGMENTS, MEAN, STD, open_folder

CLASSES = ("china", "digit", "flower")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pieces of two photographs, of many shapes, and handwritten digits: JPEG, PNG, grey, RGBA."""
    folder = tmp_path_factory.mktemp("photos")
    china, flower = load_sample_images().images
    digits = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for name, photo in (("china", china), ("flower", flower)):
            place = folder / part / name
            place.mkdir(parents=True)
            for n in range(count):
                height, width = rng.integers(40, 200, 2)
                top, left = rng.integers(0, 200, 2)
                piece = Image.fromarray(photo[top : top + height, left : left + width])
                piece.convert("RGBA" if n == 1 else "RGB").save(
                    place / f"{n}.{'png' if n % 2 else 'jpg'}", quality=95
                )
        place = folder / part / "digit"
        place.mkdir()
        for n in range(count):
            Image.fromarray(digits[n]).save(place / f"{n}.png")
    (folder / "test").mkdir()  # as ImageNet's: images without classes
    Image.fromarray(china).save(folder / "test" / "0.jpg")
    return folder


def batches(*rows):
    return [torch.tensor(row) for row in rows]


def every_view(data, augment="trivial", seed=3, rows=((0, 14, 3, 7), (1, 2, 4, 5, 6), (8, 13))):
    return torch.cat(list(data.views(batches(*rows), augment, seed)))


def every_eval_view(data, batch=4):
    rows = torch.arange(len(data.eval_labels)).split(batch)
    return torch.cat(list(data.eval_views(rows)))


def to_numpy(image):
    """The pixels, 0 to 255, of a normalised image."""
    mean, std = (np.array(x)[:, None, None] for x in (MEAN, STD))
    return (image.numpy() * std + mean) * 255


def test_a_folder_has_labels_and_no_image_is_read(root):
    data = open_folder(root, size=32)
    assert data.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.eval_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not data.flipped.any()
    assert (data.classes, data.shape) == (3, (3, 32, 32))
    assert data.device == torch.device("cpu")
    assert data.files[0] == b"train/china/0.jpg"
    assert data.workers >= 1


@pytest.mark.parametrize("augment", ["none", "trivial"])
def test_workers_change_nothing(root, augment):
    here = open_folder(root, size=32, erase=0.5, workers=0)
    there = dataclasses.replace(here, workers=2)
    state = torch.get_rng_state()
    assert torch.equal(every_view(here, augment), every_view(there, augment))
    assert torch.equal(every_eval_view(here), every_eval_view(there))
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws the same beside any loader


@pytest.mark.parametrize("augment", sorted(set(AUGMENTS) - {"none"}))
def test_a_view_depends_on_the_seed_and_the_sample_alone(root, augment):
    data = open_folder(root, size=32, erase=0.5, workers=0)
    order = [0, 14, 3, 7, 1, 2, 4, 5, 6, 8, 13]
    together = every_view(data, augment)
    torch.manual_seed(99)
    apart = every_view(data, augment, rows=[[i] for i in reversed(order)])
    assert torch.equal(together, apart.flip(0))
    other = every_view(data, augment, seed=4)
    assert all(not torch.equal(one, two) for one, two in zip(together, other))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_that_was_left_does_not_disturb_the_next(root, workers):
    data = open_folder(root, size=32, workers=workers)
    wanted = every_view(dataclasses.replace(data, workers=0))
    next(data.views(batches([1], [2], [3], [4], [5], [6], [7]), "trivial", seed=9))
    assert torch.equal(every_view(data), wanted)


def test_augmentations_differ(root):
    data = open_folder(root, size=32, workers=0)
    views = [every_view(data, augment) for augment in AUGMENTS]
    for n in range(4):
        for m in range(n):
            assert not torch.equal(views[n], views[m])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_evaluation_takes_the_resized_centre_in_imagenets_units(root, mode):
    data = open_folder(root, size=32, eval_size=40, eval_resize=48, interpolation=mode, workers=0)
    parts = list(data.eval_views(torch.arange(6).split(4)))
    assert [part.shape for part in parts] == [(4, 3, 40, 40), (2, 3, 40, 40)]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    with Image.open(root / "val" / "flower" / "1.png") as image:
        width, height = image.size
        short = min(width, height)
        sides = int(48 * width / short), int(48 * height / short)
        small = image.convert("RGB").resize(sides, getattr(Image.Resampling, mode.upper()))
    left, top = round((small.width - 40) / 2), round((small.height - 40) / 2)
    wanted = np.asarray(small.crop((left, top, left + 40, top + 40))).transpose(2, 0, 1)
    np.testing.assert_allclose(to_numpy(torch.cat(parts)[5]), wanted, atol=1e-3)


def test_training_without_augmentation_takes_the_centre_too(root):
    data = open_folder(root, size=42, workers=0)
    assert (data.eval_size, data.eval_resize) == (42, 48)
    same = dataclasses.replace(data, eval_files=data.files, eval_labels=data.labels)
    plain = every_view(data, "none", rows=[range(15)])
    assert torch.equal(plain, every_eval_view(same))


def test_a_random_crop_is_a_piece_of_the_image_or_of_its_mirror_image(tmp_path):
    """An image that is brighter to the right, and redder downwards, shows where a crop lies."""
    across, down = np.meshgrid(np.arange(128), np.arange(128))
    ramp = np.stack([down, np.zeros_like(down), across], 2).astype(np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "ramp").mkdir(parents=True)
        for n in range(24):
            Image.fromarray(ramp).save(tmp_path / part / "ramp" / f"{n:02}.png")
    data = open_folder(tmp_path, size=32, workers=0)
    mirrored, shares = 0, []
    for view in every_view(data, "imagenet", rows=[range(24)]):
        red, green, blue = to_numpy(view)
        step_down, step_across = np.diff(red, axis=0).mean(), np.diff(blue, axis=1).mean()
        assert step_down > 0
        assert np.abs(red - red.mean(axis=1, keepdims=True)).max() < 1e-3  # no shear, no turn
        assert np.abs(green).max() < 1e-3
        mirrored += step_across < 0
        shares.append(abs(step_down * step_across) * 32**2 / 128**2)
    assert 4 <= mirrored <= 20
    assert 0.07 < min(shares) < 0.5 < max(shares) < 1.05


def test_erased_rectangles_are_grey(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "white").mkdir(parents=True)
        for n in range(20):
            Image.new("RGB", (64, 64), "white").save(tmp_path / part / "white" / f"{n}.png")
    data = open_folder(tmp_path, size=64, erase=0.5, workers=0)
    images = every_view(data, "imagenet", rows=[range(20)])
    grey = (images.abs() < 0.02).all(1)
    white = (images > 2).all(1)
    assert (grey | white).all()
    assert 3 <= grey.any(2).any(1).sum() <= 17
    assert 0.02 <= grey[grey.any(2).any(1)].float().mean((1, 2)).min()


def test_some_of_the_images(root):
    data = open_folder(root, size=32, workers=0)
    few = data.subset(np.array([0, 6, 14]), np.array([5]))
    assert few.labels.tolist() == [0, 1, 2]
    assert few.eval_labels.tolist() == [2]
    wanted = every_view(data, "none", rows=[[0, 6, 14]])
    assert torch.equal(every_view(few, "none", rows=[[0, 1, 2]]), wanted)
    assert torch.equal(every_eval_view(few), every_eval_view(data)[5:])


def test_labelled_test_images_go_before_validation_images(root, tmp_path):
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / "val").symlink_to(root / "val")
    (tmp_path / "test").symlink_to(root / "train")
    assert len(open_folder(tmp_path).eval_files) == 15
    assert len(open_folder(root).eval_files) == 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_image_is_told_in_one_line(root, tmp_path, workers, damage):
    whole = (root / "train" / "china" / "0.jpg").read_bytes()
    for part in ("train", "val"):
        (tmp_path / part / "china").mkdir(parents=True)
        (tmp_path / part / "china" / "0.jpg").write_bytes(whole)
    bad = whole[: len(whole) // 2] if damage == "cut" else b"no image at all"
    (tmp_path / "train" / "china" / "0.jpg").write_bytes(bad)
    data = open_folder(tmp_path, size=32, workers=workers)
    with pytest.raises(InputError, match=r"train/china/0.jpg is no image .*; replace") as error:
        every_view(data, rows=[[0]])
    assert "\n" not in str(error.value)


def test_workers_that_cannot_start_are_told_in_one_line(root):
    """A script that is read from standard input cannot be read again by a worker."""
    script = (
        "import torch\nfrom pathlib import Path\n"
        "from fmnlib.training.streamed import open_folder\n"
        f"data = open_folder(Path({str(root)!r}), size=32, workers=1)\n"
        "next(data.views([torch.tensor([0])], 'none', 0))"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "InputError: reading images ended: DataLoader worker" in last
    assert "under `if __name__ == '__main__':`, free memory, or set FMN_WORKERS=0" in last


def test_the_environment_says_how_many_workers(root, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # as torchrun tells its processes
    assert open_folder(root).workers == 1
    monkeypatch.setenv("FMN_WORKERS", "0")
    assert open_folder(root).workers == 0
    assert open_folder(root, workers=3).workers == 3
    monkeypatch.setenv("FMN_WORKERS", "many")
    with pytest.raises(InputError, match="FMN_WORKERS is 'many'; make it a count"):
        open_folder(root)


def test_bad_folders_are_told_in_one_line(root, tmp_path):
    with pytest.raises(InputError, match="must hold train/CLASS/"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / "val" / "china").mkdir(parents=True)
    with pytest.raises(InputError, match="of the same classes"):
        open_folder(tmp_path)
    for name in CLASSES:
        (tmp_path / "val" / name).mkdir(exist_ok=True)
    with pytest.raises(InputError, match="Found no valid file for the classes") as error:
        open_folder(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="augment is 'crop'.*choose one of none, imagenet"):
        open_folder(root).views(batches([0]), "crop", seed=0)
