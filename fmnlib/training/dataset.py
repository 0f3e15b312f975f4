"""Training and evaluation images on one device, and the views of them that an epoch shows.

Images stay uint8 and on the device; a batch is gathered, moved and normalised there.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fmnlib.training.augment import draw, moved
from fmnlib.training.streamed import StreamedSet

__all__ = ["Bank", "Data", "DataSet"]


@dataclasses.dataclass(frozen=True)
class Bank:
    """A bounded set of views of each image, so that what a teacher says of them can be kept.

    Attributes:
        moves: As `fmnlib.training.augment.draw` gives them, `[views, 3, samples]`.
        chosen: Which view each sample shows in the epoch at hand, `[samples]`; written in place.
    """

    moves: Tensor
    chosen: Tensor

    def choose(self, generator: torch.Generator) -> Tensor:
        """Choose a view of each sample for an epoch; its moves, `[3, samples]`."""
        self.chosen.random_(len(self.moves), generator=generator)
        return self.moves.gather(0, self.chosen.expand(1, 3, -1))[0]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Training and evaluation data on one device.

    Attributes:
        images: Training images, uint8 `[samples, channels, side, side]`.
        labels: The labels to train on, noise included, `[samples]`.
        flipped: Which labels are wrong, `[samples]`.
        eval_images: Images to record.
        eval_labels: Their true classes.
        classes: Number of classes.
        mean: Mean of the training images per channel, in units of 255.
        std: Standard deviation likewise.
        bank: The views to choose among, where they are not drawn anew in each epoch.
    """

    images: Tensor
    labels: Tensor
    flipped: Tensor
    eval_images: Tensor
    eval_labels: Tensor
    classes: int
    mean: Tensor
    std: Tensor
    bank: Bank | None = None

    def normalize(self, images: Tensor) -> Tensor:
        """Float images of mean 0 and deviation 1, channels last."""
        scale = 1 / (255 * self.std)
        shifted = images * scale[:, None, None] - (self.mean / self.std)[:, None, None]
        return shifted.contiguous(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.images.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.images.shape[1:])

    def views(self, batches: Iterable[Tensor], augment: str, seed: int) -> Iterator[Tensor]:
        """Training images as an epoch shows them: shifted, mirrored, normalised.

        How a sample is moved depends on the seed and its index, not on the batch that it is in.

        Args:
            batches: Indices of the samples of each batch.
            augment: none, crop or crop_flip.
            seed: Source of the randomness.
        """
        if augment == "none":
            yield from (self.normalize(self.images[index]) for index in batches)
            return
        generator = torch.Generator(self.device).manual_seed(seed)
        if self.bank is None:
            moves = draw(augment, self.shape[-1], len(self.labels), generator)
        else:
            moves = self.bank.choose(generator)
        for index in batches:
            yield self.normalize(moved(self.images[index], moves[:, index]))

    def eval_views(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Evaluation images, normalised, for batches of their indices."""
        return (self.normalize(self.eval_images[index]) for index in batches)


Data = DataSet | StreamedSet
"""What training takes, images in memory or in files."""
