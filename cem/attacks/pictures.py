"""A few unseen images and what every attack makes of them, as ``images.npz`` keeps them and pictures show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from cem.attacks.metrics import score_images
from cem.data import ImageSet
from cem.errors import CheckpointError
from cem.files import replacing
from cem.report.reconstructions import Images, Scores

IMAGES = "images.npz"


@dataclass(frozen=True)
class Pictures:
    """What attacks make of a few images.

    Attributes:
        originals: uint8 ``[n, C, H, W]``.
        guesses: by attack or control: uint8 ``[n, C, H, W]``, and SSIM and MSE ``[n]``; NaN where not defined.
        worst: the attack with the smallest MSE on all images.
    """

    originals: Images
    guesses: dict[str, tuple[Images, Scores, Scores]]
    worst: str


def keep_pictures(folder: Path, shown: ImageSet, guesses: Mapping[str, Tensor], worst: str) -> Pictures:
    """Write ``images.npz``, complete or not at all.

    Args:
        folder: to write into.
        shown: the originals.
        guesses: by attack or control, float ``[n, C, H, W]`` in [0, 1].
        worst: see :class:`Pictures`.
    """
    originals, nothing = shown.images.numpy(), np.full(len(shown), np.nan)
    scores = {name: score_images(guess, shown.images.float() / 255) for name, guess in guesses.items()}
    found: dict[str, tuple[Images, Scores, Scores]] = {
        name: (
            (guess * 255).round().byte().numpy(),
            nothing if (ssim := scores[name].ssim) is None else ssim.numpy(),
            scores[name].mse.numpy(),
        )
        for name, guess in guesses.items()
    }
    pixels, similar, errors = (np.stack(each) for each in zip(*found.values(), strict=True))
    with replacing(folder / IMAGES) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, originals=originals, labels=shown.labels.numpy(), indices=shown.indices.numpy(), attacks=[*found],
            guesses=pixels, ssim=similar, mse=errors, worst=worst,
        )  # fmt: skip
    return Pictures(originals, found, worst)


def read_pictures(folder: Path, most: int | None = None) -> Pictures | None:
    """What :func:`keep_pictures` wrote, of the first ``most`` images if not of all; ``None`` if there is nothing.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / IMAGES
    try:
        with np.load(path) as content:
            originals, guesses, ssim, mse = (content[name] for name in ("originals", "guesses", "ssim", "mse"))
            names, worst = content["attacks"].tolist(), str(content["worst"])
        originals, guesses, ssim, mse = originals[:most], guesses[:, :most], ssim[:, :most], mse[:, :most]
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and NumPy raise whatever they stumble over in a damaged file
        reason = error.strerror if isinstance(error, OSError) else None
        raise CheckpointError(f"cannot read {path}: {reason or 'it is damaged'}") from error
    expected = {(len(names), *originals.shape): [guesses], (len(names), len(originals)): [ssim, mse]}
    fits = all(each.shape == shape for shape, arrays in expected.items() for each in arrays)
    pixels = originals.ndim == 4 and originals.size and originals.dtype == guesses.dtype == np.uint8
    if not (fits and pixels and worst in names):
        raise CheckpointError(f"{path} is damaged: expected the same images of every attack")
    return Pictures(originals, dict(zip(names, zip(guesses, ssim, mse, strict=True), strict=True)), worst)
