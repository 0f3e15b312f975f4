"""fmnlib.plane: the rule, the lattice, and its way through the rest of the library."""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch

from fmnlib import RunConfig
from fmnlib.data import load
from fmnlib.paper.plots import decision_regions
from fmnlib.plane import SIDE, wave
from fmnlib.training import train


def test_classes_follow_the_wave():
    images, labels, lattice, classes = wave(300, seed=4)
    for points, answers in ((images, labels), (lattice, classes)):
        for (x, y), answer in zip(points[:, :, 0, 0].tolist(), answers):
            assert answer == (y > 128 + 56 * math.sin(2 * math.pi * x / 256))
    assert abs(classes.mean() - 0.5) < 0.01  # a sine has as much above as below


def test_the_lattice_covers_the_square_row_by_row():
    lattice = wave()[2][:, :, 0, 0].astype(int)
    x, y = lattice.reshape(SIDE, SIDE, 2).transpose(2, 0, 1)
    assert x.shape == (SIDE, SIDE)
    assert x[0].tolist() == y[:, 0].tolist() == list(range(2, 256, 4))
    assert (x == x[0]).all()
    assert (y == y[:, :1]).all()


def test_a_network_trains_on_it_and_learns_the_wave(tmp_path):
    config = RunConfig(dataset="wave", model="mlp", lr=0.03, epochs=15, keep_every=15)
    data = load(config)
    assert data.images.shape == (1000, 2, 1, 1)
    assert data.images.dtype == torch.uint8
    record = train(config, tmp_path, device="cpu", data=data, progress=False)
    assert record.accuracy[-1] > 0.95
    np.testing.assert_array_equal(record.labels, wave()[3])
    noisy = load(RunConfig(dataset="wave", noise="symmetric", noise_rate=0.1))
    assert int(noisy.flipped.sum()) == 100


def test_the_border_lies_where_the_regions_meet():
    predicted = np.zeros((64, 64), int)
    predicted[:, 60:] = 1
    nothing = np.zeros((0, 2)), np.zeros(0, int), np.zeros(0, bool)
    ax = decision_regions(plt.figure().add_subplot(), predicted, *nothing)
    [path] = ax.collections[0].get_paths()
    np.testing.assert_allclose(path.vertices[:, 0], 60 * 256 / 64)
