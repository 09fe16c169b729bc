"""How close reconstructions come to the originals, image by image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cem.data import ImageSet
from cem.progress import over

# torchmetrics is imported where it measures: a command that only shows its help needs none.

SSIM_WINDOW = 11  # pixels; Wang et al. 2004
SSIM_SIGMA = 1.5  # pixels
TIED = 1e-9  # squared pixels; what rounds differently for two equal candidates
PIECE = 500  # images scored at a time
SMALLEST_MSE = 1e-10  # an exact reconstruction has 100 dB, not infinitely many


METRICS = {"mse": -1, "mse_p05": -1, "psnr": 1, "ssim": 1, "identified": 1}
"""What attacks are judged by, and which way an attacker wants it."""


class ImageScores(NamedTuple):
    """Errors of ``N`` reconstructions; a mean over images is a mean over these, not over pixels of a batch.

    Attributes:
        mse: ``[N]``, mean over channels and pixels of the squared difference.
        psnr: ``[N]``, ``10 log10(1 / mse)`` [dB], at most 100.
        ssim: ``[N]``, structural similarity, 1 for equal images; ``None`` where it is not defined, see
            :func:`ssim_window`.
    """

    mse: Tensor
    psnr: Tensor
    ssim: Tensor | None

    @classmethod
    def concatenate(cls, parts: Sequence[ImageScores]) -> ImageScores:
        """The scores of all images of several batches of one image size."""
        mse, psnr, similar = zip(*parts, strict=True)
        return cls(torch.cat(mse), torch.cat(psnr), None if similar[0] is None else torch.cat(similar))


def ssim_window(height: int, width: int) -> int | None:
    """Side [pixels] of SSIM's Gaussian window for images of this size.

    11, with σ = 1.5, as everybody has it. An image with a side below 11 gets the largest odd window that fits,
    with σ in proportion: such values compare among images of one size only. Below 3 pixels there is no
    window, and no SSIM: ``None``.
    """
    window = min(SSIM_WINDOW, height - (height + 1) % 2, width - (width + 1) % 2)
    return window if window >= 3 else None


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity ``[N]`` of images ``[N, C, H, W]`` in [0, 1]; differentiable.

    The mean over channels and over windows around every pixel, images being mirrored at their borders.

    Raises:
        ValueError: a side is below 3 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    window = ssim_window(*originals.shape[-2:])
    if window is None:
        raise ValueError(f"SSIM needs images of 3x3 pixels or more, got {tuple(originals.shape[-2:])}")
    # torchmetrics derives the side of a Gaussian window from σ alone, and gives this one for these σ. Some of its
    # releases leave the borders out of the mean and others do not; the map is the same in all.
    _, values = structural_similarity_index_measure(
        reconstructions,
        originals,
        sigma=SSIM_SIGMA * window / SSIM_WINDOW,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    return values.flatten(1).mean(1)


@torch.no_grad()
def score_images(reconstructions: Tensor, originals: Tensor) -> ImageScores:
    """Compare reconstructions with their originals.

    Args:
        reconstructions: float ``[N, C, H, W]``, in [0, 1].
        originals: the same shape and dtype.

    Raises:
        ValueError: the shapes differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio
    from torchmetrics.functional.regression import mean_squared_error

    if reconstructions.shape != originals.shape:
        raise ValueError(
            f"reconstructions and originals must have one shape, got {tuple(reconstructions.shape)} "
            f"and {tuple(originals.shape)}"
        )
    count = len(originals)
    mse = mean_squared_error(reconstructions.reshape(count, -1).T, originals.reshape(count, -1).T, num_outputs=count)
    # PSNR follows from MSE for images in [0, 1]; through torchmetrics all the same, with its floor put in.
    psnr = peak_signal_noise_ratio(
        mse.clamp(min=SMALLEST_MSE).sqrt().reshape(count, 1, 1, 1),
        torch.zeros_like(mse).reshape(count, 1, 1, 1),
        data_range=1.0,
        reduction="none",
        dim=(1, 2, 3),
    )
    similar = ssim(reconstructions, originals) if ssim_window(*originals.shape[-2:]) else None
    return ImageScores(mse.reshape(count), psnr.reshape(count), similar)


@torch.no_grad()
def ranks(reconstructions: Tensor, candidates: ImageSet) -> tuple[Tensor, Tensor]:
    """Whether a reconstruction points at its original: how many images of its class lie nearer to it.

    Args:
        reconstructions: float ``[N, C, H, W]`` in [0, 1], of the first ``N`` images of ``candidates``.
        candidates: among these the original is looked for.

    Returns:
        ``[N]`` ranks, 1 where no image of the class is nearer (squared error) than the original; ``[N]`` how many
        candidates there were, the original among them.
    """
    rank, number = torch.zeros(2, len(reconstructions), dtype=torch.int64)
    labels = candidates.labels[: len(reconstructions)]
    for label in over(labels.unique().tolist(), "looking originals up"):
        mine, among = (labels == label).nonzero().flatten(), (candidates.labels == label).nonzero().flatten()
        # fp64: squares and products of pixels cancel where a reconstruction is nearly exact.
        guess, images = (each.flatten(1).double() for each in (reconstructions[mine], candidates.images[among]))
        images = images / 255
        distance = images.square().sum(1) - 2 * guess @ images.T  # but for what is the same for all candidates
        own = distance.gather(1, torch.searchsorted(among, mine)[:, None])
        rank[mine] = 1 + (distance < own - TIED).sum(1)
        number[mine] = len(among)
    return rank, number


def judged(reconstructions: Tensor, images: ImageSet) -> dict[str, float | None]:
    """What reconstructions are worth, ready for JSON; ``None`` where not a number.

    Args:
        reconstructions: float ``[N, C, H, W]`` in [0, 1], of the first ``N`` of ``images``.
        images: the originals; among all of them, of the same class, ``identified`` looks for the original.

    Returns:
        ``mse``, ``psnr``, ``ssim``: means over images, see :class:`ImageScores`. ``mse_p05``: the 5th percentile of
        the images' MSE, what the worst protected have. ``identified``: the share of reconstructions to which no other
        image of the class is nearer than the original; ``chance``: the share that a guess without features would
        have; ``candidates``: images of a class, mean over reconstructions; ``median_rank`` of the original. ``images``:
        ``N``.
    """
    originals = images.images[: len(reconstructions)].float() / 255
    parts = list(zip(reconstructions.split(PIECE), originals.split(PIECE), strict=True))
    scores = ImageScores.concatenate([score_images(one, other) for one, other in over(parts, "scoring")])
    rank, number = ranks(reconstructions, images)
    means = {name: None if each is None else each.double().mean() for name, each in scores._asdict().items()} | {
        "mse_p05": scores.mse.double().quantile(0.05),
        "identified": (rank == 1).double().mean(),
        "chance": (1 / number.double()).mean(),
        "candidates": number.double().mean(),
        "median_rank": rank.double().median(),
    }
    found = {name: None if value is None else value.item() for name, value in means.items()}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in found.items()}
    return {**finite, "images": len(reconstructions)}


def best(metric: str, scores: Mapping[str, Mapping[str, float | None]]) -> str:
    """Of several scores, the name of those with which an attacker does best by ``metric``; the first among equals."""

    def success(name: str) -> float:
        value = scores[name][metric]
        return -math.inf if value is None else METRICS[metric] * value

    return max(scores, key=success)
