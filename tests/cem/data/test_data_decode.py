"""One image file: every kind becomes upright 8-bit RGB as a viewer shows it, and what was done is said."""

import struct
from functools import partial

import numpy as np
import pytest
from PIL import Image

from cem.data import load_data
from cem.data.decode import read_image
from cem.errors import DataError

RAMP = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
GRAY = np.rint(RAMP / 257).astype(np.uint8)
COLORS = np.random.default_rng(0).integers(256, size=(6, 8, 3), dtype=np.uint8)
ON_WHITE, FRAMES = "with transparent parts laid on white", "with several frames cut to the first"
DEEP = "of 16-bit gray scaled to 8 bits"


def gray(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, axis=2)


def pgm(path):
    path.write_bytes(b"P5\n8 6\n4095\n" + (RAMP >> 4).astype(">u2").tobytes())


def tiff(path, levels, bits=16, black=1):
    """A TIFF of gray levels packed into ``bits``, with ``black`` in the tag that says whether white is zero."""
    packed = int("".join(f"{level:012b}" for level in levels.flatten().tolist()), 2)
    data = packed.to_bytes(72, "big") if bits == 12 else levels.astype("<u2").tobytes()
    tags = {256: 8, 257: 6, 258: bits, 259: 1, 262: black, 273: 122, 277: 1, 278: 6, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data)


def transparent(path, mode="RGBA"):
    """Black ink on nothing, under which black lies as well."""
    image = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 6))
    image.convert(mode).save(path)


def indexed(path, **options):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8), "L").convert("P")
    image.putpalette(COLORS.reshape(-1).tolist())
    image.save(path, **options)


def save(name, image, **options):
    return name, lambda path: image.save(path, **options)


PLAIN, INVERSE, DEEP_IMAGE = (Image.fromarray(each) for each in (COLORS, 255 - COLORS, RAMP))
INK, SHALLOW = gray([[0] * 4 + [255] * 4] * 6), gray(np.rint((RAMP >> 4) / 4095 * 255))
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {
    "gray": (*save("a.png", Image.fromarray(GRAY)), gray(GRAY), ["gray made RGB"]),
    "1 bit": (*save("a.png", Image.fromarray(GRAY > 99)), gray(255 * (GRAY > 99)), ["black and white made RGB"]),
    "16-bit PNG": (*save("a.png", DEEP_IMAGE), gray(GRAY), [DEEP]),
    "16-bit TIFF": (*save("a.tif", DEEP_IMAGE), gray(GRAY), [DEEP]),
    "16-bit TIFF, white is zero": ("a.tif", lambda path: tiff(path, 65535 - RAMP, black=0), gray(GRAY), [DEEP]),
    "12-bit TIFF": ("a.tif", lambda path: tiff(path, RAMP >> 4, 12), SHALLOW, [DEEP]),
    "12-bit PGM": ("a.pgm", pgm, SHALLOW, [DEEP]),
    "CMYK": (*save("a.tif", PLAIN.convert("CMYK")), COLORS, ["CMYK made RGB"]),
    "palette": ("a.png", indexed, COLORS, ["palette made RGB"]),
    "alpha": ("a.png", transparent, INK, [ON_WHITE]),
    "gray alpha": ("a.png", partial(transparent, mode="LA"), INK, ["gray made RGB", ON_WHITE]),
    "opaque alpha": (*save("a.png", PLAIN.convert("RGBA")), COLORS, []),
    "transparent color": ("a.png", partial(indexed, transparency=3), None, ["palette made RGB", ON_WHITE]),
    "frames": (*save("a.webp", PLAIN, save_all=True, append_images=[INVERSE], lossless=True), COLORS, [FRAMES]),
    "turned": (*save("a.png", PLAIN, exif=TURNED), np.rot90(COLORS, -1), ["turned upright"]),
    "turned TIFF": (*save("a.tif", PLAIN, exif=TURNED), np.rot90(COLORS, -1), ["turned upright"]),
    "turned deep": (*save("a.png", DEEP_IMAGE, exif=TURNED), gray(np.rot90(GRAY, -1)), ["turned upright", DEEP]),
    "broken EXIF": (*save("a.png", PLAIN, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), COLORS, []),
}  # fmt: skip


@pytest.mark.parametrize(("name", "make", "expected", "said"), KINDS.values(), ids=KINDS)
def test_every_kind_is_read_as_it_is_shown(tmp_path, name, make, expected, said):
    make(tmp_path / name)
    if expected is None:  # the one index that is transparent is white
        expected = COLORS.copy()
        expected[0, 3] = 255
    pixels, done = read_image(str(tmp_path / name))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)
    assert done == said


def bomb(path):
    PLAIN.save(path)
    content = bytearray(path.read_bytes())
    content[20] = content[24] = 0x10  # the third byte of width and of height
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (*save("a.tif", Image.fromarray(RAMP.astype(np.int32))), "has 32-bit or signed gray .* expected 8 bits, or"),
        (*save("a.tif", Image.fromarray(RAMP.astype(np.float32))), "has floating-point gray levels, .* convert it"),
        ("a.bmp", bomb, "not a readable image: .* exceeds limit of"),
        ("a.png", lambda path: path.write_text("<svg/>"), "not a readable image: it is none of BMP, GIF, JPEG"),
        ("a.png", lambda path: [PLAIN.save(path), path.write_bytes(path.read_bytes()[:90])], "readable image: .*trunc"),
        (*save("a.png", PLAIN, format="PDF"), "not a readable image: it is none of BMP"),
    ],
    ids=["int32", "float", "too many pixels", "no image", "cut", "a format of programs"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} .*{message}"):
        read_image(str(tmp_path / name))


def test_sixteen_bits_that_hold_twelve_are_warned_of(tmp_path):
    for number in range(20):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(RAMP >> 4).save(path)
    with pytest.warns(UserWarning, match="no 16-bit image in .* has a level above 4095 of 65535"):
        load_data("folder", tmp_path)
