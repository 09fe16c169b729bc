"""What decoders minimize."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from cem.attacks.metrics import ssim


def ssim_loss(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """``1 − SSIM + MSE``: SSIM alone hardly minds a wrong brightness, so a pixel term stands beside it.

    The same idea with L1 is in Zhao et al., "Loss Functions for Image Restoration with Neural Networks", 2017.
    """
    return 1 - ssim(reconstructions, originals).mean() + F.mse_loss(reconstructions, originals)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "ssim": ssim_loss}
"""By the names that stand behind those of networks, ``NETWORK:LOSS``: images ``[B, C, H, W]`` twice, to a number."""
