"""Random views of images that lie on a device: each shifted, some mirrored, a batch at a time."""

import torch
from torch import Tensor

__all__ = ["draw", "moved"]


def draw(augment: str, side: int, samples: int, generator: torch.Generator) -> Tensor:
    """Draw a view of each sample: rows and columns to shift by, and whether to mirror.

    Args:
        augment: crop (shifts by up to an eighth of the side) or crop_flip.
        side: Of the images, in pixels.
        samples: How many views to draw.
        generator: Source of the randomness; its device is the result's.

    Returns:
        Integers `[3, samples]`; shifts count from 0, where `side // 8` is none.
    """
    moves = torch.zeros(3, samples, dtype=torch.long, device=generator.device)
    moves[:2].random_(2 * (side // 8) + 1, generator=generator)
    if augment == "crop_flip":
        moves[2].random_(2, generator=generator)
    return moves


def moved(images: Tensor, moves: Tensor) -> Tensor:
    """Images as `draw` says, the border filled with black.

    Args:
        images: uint8 `[batch, channels, side, side]`.
        moves: Integers `[3, batch]`.

    >>> image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    >>> moved(image, torch.tensor([[2], [1], [0]]))[0, 0, 0, :3].tolist()
    [8, 9, 10]
    """
    count, channels, side, _ = images.shape
    pad = side // 8
    pixel = torch.arange(side, device=images.device)
    down, right, mirror = moves[:, :, None]
    across = torch.where(mirror > 0, pixel.flip(0), pixel)
    rows, columns = pixel + down, across + right
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)).flatten(2)
    plane = (rows[:, :, None] * (side + 2 * pad) + columns[:, None, :]).flatten(1)
    chosen = padded.gather(2, plane[:, None].expand(-1, channels, -1))
    return chosen.view(count, channels, side, side)
