"""Images in files: one rule of resizing, the same pixels whoever decodes, errors in one line."""

import dataclasses
import gc
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from fmnlib import InputError, images
from fmnlib.images import (
    Preprocessing,
    _usual_workers,
    open_folder,
    open_split,
)

SMALL = Preprocessing(size=32)
GREY = Preprocessing(size=32, mean=(0.5,), std=(0.5,))
BATCHES = [np.array([9, 0, 4]), torch.tensor([2]), np.array([5, 5, 1, 8])]


def make(folder, count=5, classes=("china", "flower")):
    """Pieces of two photographs, of many shapes: JPEG and PNG, grey, transparent, of a palette."""
    rng = np.random.default_rng(0)
    for name, photo in zip(classes, load_sample_images().images):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            height, width, top = rng.integers(40, 200, 3)
            piece = Image.fromarray(photo[top : top + height, :width])
            mode = ("RGB", "RGBA", "P", "L", "LA")[n % 5]
            known = {"transparency": bytes(range(256))} if mode == "P" else {}
            ending = "jpg" if mode == "RGB" else "png"
            piece.convert(mode).save(folder / name / f"{n}.{ending}", **known)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("photos"))


def opened(folder, preprocessing=SMALL, workers=0):
    return dataclasses.replace(open_folder(folder, preprocessing), workers=workers)


def workers_of_this_process():
    return {process.pid for process in multiprocessing.active_children()}


def test_a_folder_is_listed_by_class(folder):
    data = open_folder(folder, SMALL)
    assert data.classes == ["china", "flower"]
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert (data.files[5], data.files.dtype.kind) == (b"flower/0.jpg", "S")
    assert (len(data), data.shape) == (10, (10, 3, 32, 32))
    assert dataclasses.replace(data, preprocessing=GREY).shape == (10, 1, 32, 32)


@pytest.mark.parametrize("name", [f"{n}.{'png' if n else 'jpg'}" for n in range(5)])
@pytest.mark.parametrize(
    "preprocessing", [SMALL, GREY, Preprocessing(size=40, resize=40)], ids=str
)
def test_the_rule_is_that_of_torchvision(folder, name, preprocessing):
    """On a photograph that is not square, of every kind that PIL converts."""
    side, shorter = preprocessing.size, {32: 37, 40: 40}[preprocessing.size]
    colour = v2.RGB() if len(preprocessing.mean) == 3 else v2.Grayscale()
    with Image.open(folder / "flower" / name) as image:
        image.info.clear()
        assert image.width != image.height
        steps = [colour, v2.Resize(shorter), v2.CenterCrop(side), v2.PILToTensor()]
        wanted = v2.Compose(steps)(image)
    data = opened(folder, preprocessing)
    index = np.flatnonzero(data.files == f"flower/{name}".encode())
    assert torch.equal(data[index].load()[0], wanted)


@pytest.mark.parametrize("preprocessing", [SMALL, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_all_images_in_order(folder, preprocessing, workers):
    data, state = opened(folder, preprocessing, workers), torch.get_rng_state()
    everything = data.load()
    assert everything.dtype == torch.uint8
    assert everything.shape == data.shape
    assert len({image.numpy().tobytes() for image in everything}) == 10
    for _ in range(2):
        batches = list(data.read(BATCHES))
        assert len(batches) == 3
        assert all(
            torch.equal(b, everything[torch.as_tensor(i)]) for b, i in zip(batches, BATCHES)
        )
    assert torch.equal(everything, opened(folder, preprocessing).load())
    assert list(data.read([])) == []
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws the same beside any loader


def test_a_second_pass_reuses_the_workers_and_they_end_with_the_object(folder):
    before, data = workers_of_this_process(), opened(folder, workers=2)
    first = list(data.read(BATCHES))
    started = workers_of_this_process() - before
    assert len(started) == 2
    next(data.read(BATCHES * 4))  # a pass that is left half way
    assert all(torch.equal(a, b) for a, b in zip(first, data.read(BATCHES), strict=True))
    assert workers_of_this_process() - before == started
    del data
    gc.collect()
    assert not workers_of_this_process() & started


def test_some_of_the_images(folder):
    data = opened(folder)
    few = data[np.array([7, 2])]
    assert few.labels.tolist() == [1, 0]
    assert torch.equal(few.load(), data.load()[[7, 2]])
    assert data[np.flatnonzero(data.labels)].files.tolist() == data.files[5:].tolist()


def test_what_fits_in_memory(folder, monkeypatch):
    data = open_folder(folder, SMALL)
    monkeypatch.setattr(images, "IN_MEMORY", 10 * 3 * 32 * 32)
    assert data.fits()
    monkeypatch.setattr(images, "IN_MEMORY", 10 * 3 * 32 * 32 - 1)
    assert not data.fits()


def test_progress_is_shown(folder, capsys):
    open_folder(folder, SMALL).load()
    assert f"reading {folder.name}: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "missing", "huge", "bomb"])
def test_a_damaged_file_is_named_in_one_line_and_the_next_pass_works(tmp_path, workers, damage):
    data, bad = opened(make(tmp_path), workers=workers), tmp_path / "flower" / "0.jpg"
    before = workers_of_this_process()
    whole = bad.read_bytes()
    content = {"cut": whole[: len(whole) // 2], "foreign": b"no image at all", "empty": b""}
    if damage in content:
        bad.write_bytes(content[damage])
    elif damage == "missing":
        bad.unlink()
    else:  # PIL warns of 90 million pixels, and refuses 180 million
        Image.new("1", (10_000, 9_000 if damage == "huge" else 18_000)).save(bad, "png")
    reason = r"cannot be read as an image \(.+\); fix it, or move it away$"
    with pytest.raises(InputError, match=rf"^{bad} {reason}") as error:
        list(data.read(BATCHES))
    assert "\n" not in str(error.value)
    assert workers_of_this_process() <= before
    bad.write_bytes(whole)
    assert torch.equal(torch.cat(list(data.read(BATCHES))), data.load()[[9, 0, 4, 2, 5, 5, 1, 8]])


def test_workers_that_cannot_start_are_named_in_one_line(folder):
    """A script that is read from standard input cannot be read again by a worker."""
    script = (
        "import dataclasses, numpy as np\nfrom pathlib import Path\n"
        "from fmnlib.images import Preprocessing, open_folder\n"
        f"data = open_folder(Path({str(folder)!r}), Preprocessing(size=32))\n"
        "next(dataclasses.replace(data, workers=1).read([np.array([0])]))"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "InputError: reading images ended: DataLoader worker" in last
    assert "under `if __name__ == '__main__':`, free memory, or set FMN_WORKERS=0" in last


def test_the_number_of_workers(folder, monkeypatch):
    monkeypatch.delenv("FMN_WORKERS", raising=False)
    assert _usual_workers() == joblib.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # as torchrun sets it
    assert _usual_workers() == 1
    monkeypatch.setenv("FMN_WORKERS", "0")
    assert _usual_workers() == 0
    monkeypatch.setenv("FMN_WORKERS", "many")
    with pytest.raises(InputError, match="FMN_WORKERS is 'many'; make it a count, 0 for this"):
        next(open_folder(folder, SMALL).read(BATCHES))


def test_a_test_folder_goes_before_val_if_its_classes_are_those_of_train(folder, tmp_path):
    make(tmp_path / "val", count=1)
    (tmp_path / "train").symlink_to(folder)
    (tmp_path / "test" / "unknown").mkdir(parents=True)
    train, test = open_split(tmp_path, SMALL)
    assert (len(train), len(test), test.root.name) == (10, 2, "val")
    (tmp_path / "test" / "unknown").rmdir()
    make(tmp_path / "test", count=2)
    train, test = open_split(tmp_path, GREY)
    assert (len(test), test.root.name, test.preprocessing) == (4, "test", GREY)


def test_missing_and_empty_folders_are_named_in_one_line(folder, tmp_path):
    lines = []

    def fails(function, path, match):
        with pytest.raises(InputError, match=match) as error:
            function(path, SMALL)
        lines.append(str(error.value))

    fails(open_folder, tmp_path / "nowhere", r"nowhere must hold CLASS/ folders of images \(")
    fails(open_split, tmp_path, r"must hold train/CLASS/ and test/CLASS/ \(or val/\) of the same")
    (tmp_path / "train").symlink_to(folder)
    fails(open_split, tmp_path, "of the same classes$")
    (tmp_path / "test" / "china").mkdir(parents=True)
    fails(open_split, tmp_path, "of the same classes$")
    (tmp_path / "test" / "flower").mkdir()
    fails(
        open_split, tmp_path, "test must hold .*Found no valid file for the classes china, flower"
    )
    assert not any("\n" in line for line in lines)


def test_thousands_of_files_are_opened_without_decoding(tmp_path):
    for n in range(3000):
        place = tmp_path / f"{n % 3}"
        place.mkdir(exist_ok=True)
        (place / f"{n:04}.png").write_bytes(b"damaged")  # decoding one would be an error
    data = open_folder(tmp_path, SMALL)
    assert np.bincount(data.labels).tolist() == [1000] * 3
    assert data.files.nbytes == 3000 * len("0/0000.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_holds_few_batches_in_memory(tmp_path, workers):
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is measured where there is /proc")
    (tmp_path / "0").mkdir()
    for n in range(400):
        Image.new("RGB", (256, 256), (n % 256, 9, 9)).save(tmp_path / "0" / f"{n:03}.png")
    data = opened(tmp_path, Preprocessing(resize=224), workers)
    list(data.read([np.arange(8)]))  # workers, threads and modules are there
    start, most = memory(), 0
    for batch in data.read(np.arange(400).reshape(50, 8)):
        assert batch.shape == (8, 3, 224, 224)
        most = max(most, memory() - start)
    assert most < np.prod(data.shape) / 3


def memory():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0, "resize": 8}, "size is 0 and resize is 8; give 1 or more"),
        ({"resize": 100}, "size is 224 and resize is 100; give 1 or more, and resize 0 or"),
        ({"mean": (0.5, 0.5), "std": (1.0,)}, r"mean is \(0.5, 0.5\) and std is \(1.0,\); give"),
        ({"std": (0.0, 1.0, 1.0)}, "give one or three numbers each, std above 0"),
        ({"std": (math.nan, 1.0, 1.0)}, "give one or three numbers each, std above 0"),
        ({"mean": (127.0,), "std": (1.0,)}, r"mean is \(127.0,\); give it for pixels from 0"),
    ],
)
def test_bad_preprocessing_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Preprocessing(**changes)


def test_preprocessing_in_words_and_numbers():
    assert str(GREY) == "shorter side to 37 pixels, middle 32 x 32, mean 0.5, std 0.5"
    assert Preprocessing().shorter == 256
    white = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    wanted = (1 - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    torch.testing.assert_close(SMALL.normalize(white)[1, :, 2, 3], wanted)
