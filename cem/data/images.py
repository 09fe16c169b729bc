"""Images held in memory, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[Batch]):
    """Labeled images in memory.

    An item is ``(image, label)``: float32 ``[C, H, W]`` in [0, 1] and int64 ``[]``. A ``DataLoader`` fetches
    a whole batch by one indexing operation (``__getitems__``): see :func:`make_loader`.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        indices: int64 ``[N]``, where each image stands in the file that it came from. With ``origin`` this
            identifies an image for good, so that two sets can be shown to be disjoint.
        origin: the file that ``indices`` count in: ``"train"``, ``"test"``, or ``"all"`` if there is but one.
        augment: uint8 ``[C, H, W]`` -> the same, applied to each image every time it is read.

    Raises:
        ValueError: a tensor has the wrong dtype or shape.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    origin: str
    augment: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}")
        for name, tensor in (("labels", self.labels), ("indices", self.indices)):
            if tensor.dtype != torch.int64 or tensor.shape != (len(self.images),):
                raise ValueError(f"{name} must be int64 [{len(self.images)}], got {tensor.dtype} {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Batch:
        images, labels = self.__getitems__([position])
        return images[0], labels[0]

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """``(images float32 [B, C, H, W] in [0, 1], labels int64 [B])`` at ``positions``."""
        chosen = torch.as_tensor(positions)
        images = self.images[chosen]
        if self.augment is not None:
            images = torch.stack([self.augment(image) for image in images])
        return images.float().div_(255), self.labels[chosen]

    def subset(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """The images at ``positions``, in that order, with their indices in the original file."""
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], indices=self.indices[chosen])


class LoneSampleJoins(BatchSampler):
    """Batches of ``batch_size`` positions; a last one of a single sample joins the batch before it.

    Batch normalization cannot train on one value per channel, which is what a single sample is wherever maps
    have shrunk to one pixel.
    """

    def __init__(self, sampler: RandomSampler, batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self._samples = len(sampler)

    def __len__(self) -> int:
        whole, rest = divmod(self._samples, self.batch_size)
        return whole + (rest > 1 or (rest == 1 and whole == 0))

    def __iter__(self) -> Iterator[list[int]]:
        positions = list(self.sampler)
        for number in range(len(self)):
            start = number * self.batch_size
            yield positions[start : start + self.batch_size] if number + 1 < len(self) else positions[start:]


def make_loader(
    image_set: ImageSet,
    batch_size: int,
    *,
    shuffle: bool,
    generator: torch.Generator | None = None,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """Batches ``(images [B, C, H, W], labels [B])`` of an :class:`ImageSet`.

    The last one may be smaller; when shuffled, which means training, it may instead have one sample more: see
    :class:`LoneSampleJoins`.

    Args:
        image_set: where the images come from.
        batch_size: images in a batch.
        shuffle: a new order in each pass.
        generator: source of that order; torch's default generator if left out.
        num_workers: processes that read ahead, worth having only with augmentation.
    """
    batches: dict[str, Any] = {"batch_size": batch_size}
    if shuffle:
        batches = {"batch_sampler": LoneSampleJoins(RandomSampler(image_set, generator=generator), batch_size)}
    return DataLoader(
        image_set,
        **batches,
        generator=generator,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
    )


def _identity(batch: T) -> T:
    """The data set has collated already. A named function, because worker processes must pickle it."""
    return batch
