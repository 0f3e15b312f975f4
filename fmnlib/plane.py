"""A problem in the plane, on which one can see what a network forgets (AAAI, Fig. 1).

A point is an image of one pixel with two channels, its coordinates, so that it is processed like
any other data set. The evaluation data are a lattice over the whole square: the record of a run
then shows its decision regions over time, and accuracy is the share of the area that is right.
"""

import numpy as np
from jaxtyping import Float, Int, Real, UInt8

SIDE = 64  # points of the lattice along each side of the square


def wave(
    samples: int = 1000, seed: int = 0
) -> tuple[
    UInt8[np.ndarray, "samples 2 1 1"],
    Int[np.ndarray, " samples"],
    UInt8[np.ndarray, "lattice 2 1 1"],
    Int[np.ndarray, " lattice"],
]:
    """Two classes in a square of 256 units, above and below a sine wave.

    Training points, drawn evenly from the square, and their classes; then the lattice, row by row
    from below, and its classes.

    >>> images, labels, lattice, classes = wave()
    >>> lattice[:2, :, 0, 0].tolist(), classes[[0, -1]].tolist()
    ([[2, 2], [6, 2]], [0, 1])
    """
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 256, (samples, 2))
    axis = np.arange(SIDE) * 256 // SIDE + 128 // SIDE
    lattice = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    images = [part.astype(np.uint8)[:, :, None, None] for part in (points, lattice)]
    above = [(part[:, 1] > border(part[:, 0])).astype(np.int64) for part in (points, lattice)]
    return images[0], above[0], images[1], above[1]


def border(x: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Where the classes meet: y = 128 + 56 sin(2 pi x / 256).

    >>> border(np.array([0.0, 64.0])).tolist()
    [128.0, 184.0]
    """
    return 128 + 56 * np.sin(2 * np.pi * x / 256)
