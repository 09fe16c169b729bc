"""One image file as 8-bit RGB, upright, and what had to be done to make it so."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cem.errors import DataError

Pixels = NDArray[np.uint8]

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
DEEP_GRAY = "of 16-bit gray scaled to 8 bits"
# Others are not even tried: some of Pillow's readers start programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_KINDS = {"1": "black and white", "L": "gray", "LA": "gray", "P": "palette", "PA": "palette"}
_ORIENTATION, _BITS_PER_SAMPLE, _WHITE_IS_ZERO = 0x0112, 258, 262  # EXIF, and TIFF, where the third is 0 if so
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def read_image(path: str) -> tuple[Pixels, list[str]]:
    """Read an image as uint8 ``[H, W, 3]``.

    Gray levels of more than 8 bits are scaled, rounded, where the format says which of them is white. What is
    transparent lies on white. The first of several frames counts. An EXIF orientation is followed.

    Returns:
        The pixels, and a phrase for each thing that was done to them.

    Raises:
        DataError: the file cannot be read, is none of the formats, is broken, claims more pixels than Pillow allows,
            or has levels of which nobody knows which is white.
    """
    try:
        with open(path, "rb") as file, Image.open(BytesIO(file.read()), formats=_FORMATS) as image:
            turned = _orientation(image) in _UPRIGHT
            image.load()
        # Pillow has turned a TIFF by itself, and then says that it is upright.
        way = _orientation(image)
        upright = image.transpose(_UPRIGHT[way]) if way in _UPRIGHT else image
        deep = image.mode.startswith(("I", "F"))
        rgb, done = (upright, [DEEP_GRAY]) if deep else _as_rgb(upright)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not a readable image: it is none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # whatever Pillow raises at a broken file, the file is what is wrong
        raise DataError(f"{path} is not a readable image: {error or type(error).__name__}") from error
    frames = getattr(image, "n_frames", 1)
    done = ["with several frames cut to the first"] * (frames > 1) + ["turned upright"] * turned + done
    return _scaled(image, upright, path) if deep else np.asarray(rgb), done


def _as_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    done = [] if image.mode in ("RGB", "RGBA") else [f"{_KINDS.get(image.mode, image.mode)} made RGB"]
    if image.mode.endswith("A") or "transparency" in image.info:
        # Colors that nobody sees are whatever a program left there, often black under black ink.
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            done.append("with transparent parts laid on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB"), done


def _scaled(image: Image.Image, upright: Image.Image, path: str) -> Pixels:
    """Gray levels of more than 8 bits; ``upright`` is ``image`` turned, which no longer knows its format."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith("I;16"):
        white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow keeps their 16 bits in 32
        white = 2**16 - 1
    else:
        what = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise DataError(
            f"{path} has {what} gray levels, and nothing says which of them is white: "
            "expected 8 bits, or 16 bits without a sign; convert it"
        )
    levels = np.asarray(upright) * (255 / white)
    if tags.get(_WHITE_IS_ZERO) == 0:
        levels = 255 - levels
    return np.repeat(np.rint(levels).astype(np.uint8)[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """From 1, upright, to 8; 1 where EXIF says nothing, or nothing that can be read: viewers ignore that too."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1
