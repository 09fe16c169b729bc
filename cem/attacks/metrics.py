"""How close reconstructions come to the originals, image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.regression import mean_squared_error

SSIM_WINDOW = 11  # pixels; Wang et al. 2004
SSIM_SIGMA = 1.5  # pixels
SMALLEST_MSE = 1e-10  # an exact reconstruction has 100 dB, not infinitely many


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


def mean_scores(scores: ImageScores) -> dict[str, float | None]:
    """Means over images by name, ready for JSON: ``mse``, ``psnr``, ``ssim``; ``None`` where not a number."""
    means = {
        name: None if values is None else values.double().mean().item() for name, values in scores._asdict().items()
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in means.items()}
