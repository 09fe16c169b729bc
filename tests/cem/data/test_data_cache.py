"""The cache of images that took long to read: what it spares, what it notices, and what it never is in the way of."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cem.data import cache, load_data, pixels


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of images, and a cache that keeps them however fast they are read."""
    monkeypatch.setenv("CEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "WORTH_KEEPING", 0.0)
    for number in range(20):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 12 * number).save(path)
    return tmp_path / "images"


@pytest.fixture
def reads(monkeypatch):
    """The files that were decoded."""
    read, found = pixels.read_image, []
    monkeypatch.setattr(pixels, "read_image", lambda path: found.append(path) or read(path))
    return found


def kept(root):
    return sorted((root.parent / "cache").iterdir())


def test_what_was_read_is_not_read_again_and_is_the_same(root, reads):
    first, second = load_data("folder", root), load_data("folder", root)
    assert len(reads) == 20
    assert all(torch.equal(getattr(first, part).images, getattr(second, part).images) for part in ("train", "test"))
    (path,) = kept(root)
    assert second.notes == (f"{first.notes[0]}; kept since an earlier run in {path}",)
    assert "20 gray made RGB" in first.notes[0]
    assert path.parent.stat().st_mode & 0o077 == 0 or os.name == "nt"


@pytest.mark.parametrize(
    ("change", "size", "again", "files"),
    [
        (lambda root: Image.new("L", (4, 4), 99).save(root / "a" / "0.png"), None, 20, 1),
        (lambda root: os.utime(root / "a" / "0.png", (1, 1)), None, 20, 1),
        (lambda root: (root / "a" / "0.png").unlink(), None, 19, 1),
        (lambda root: (root / "a" / "0.png").rename(root / "b" / "0.png"), None, 20, 1),
        (lambda root: (root / "a" / "notes.txt").write_text("more"), None, 0, 1),
        (lambda root: None, 2, 20, 2),
    ],
    ids=["another image", "another time", "one less", "another class", "no image", "another size"],
)
def test_any_change_of_the_images_is_noticed_and_replaces_what_was_kept(root, reads, change, size, again, files):
    load_data("folder", root)
    change(root)
    reads.clear()
    load_data("folder", root, image_size=size)
    assert (len(reads), len(kept(root))) == (again, files)


@pytest.mark.parametrize("place", [0, 66, 200, -1, None], ids=["checksum", "syntax", "facts", "pixels", "cut"])
def test_damage_is_noticed_and_mended(root, reads, place):
    before = load_data("folder", root).train.images
    (path,) = kept(root)
    content = bytearray(path.read_bytes())
    content[-1 if place is None else place] ^= 1
    path.write_bytes(content[:-1] if place is None else content)
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged \(.*\); the images are read again"):
        assert torch.equal(before, load_data("folder", root).train.images)
    assert len(reads) == 40
    load_data("folder", root)
    assert len(reads) == 40


def test_what_was_unused_for_longest_makes_room_and_so_do_leftovers(tmp_path, monkeypatch):
    image = np.zeros((1, 3, 10, 10), np.uint8)
    for age, name in enumerate(("mine.txt", "unused.images", "used.images", ".dead.images.1.tmp")):
        cache.save(tmp_path / name, "key", image, {})
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    cache.load(tmp_path / "used.images", "key")
    monkeypatch.setattr(cache, "LIMIT", 2 * (tmp_path / "mine.txt").stat().st_size)
    cache.save(tmp_path / "next.images", "key", image, {})
    cache.save(tmp_path / "large.images", "key", image.repeat(9, 0), {})
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "used.images", "next.images"}


def test_short_reads_are_not_kept_and_where_nothing_can_be_kept_nothing_is(root, monkeypatch, reads):
    monkeypatch.setattr(pixels, "WORTH_KEEPING", 60.0)
    load_data("folder", root)
    monkeypatch.setattr(pixels, "WORTH_KEEPING", 0.0)
    (root.parent / "cache").write_text("a file in its place")
    load_data("folder", root)
    monkeypatch.setenv("CEM_CACHE", "")
    load_data("folder", root)
    assert len(reads) == 60


def test_full_disk_keeps_nothing_and_reads_all_the_same(root, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(load_data("folder", root).test.images)
    assert kept(root) == []


@pytest.mark.parametrize(
    ("platform", "variables", "place"),
    [
        ("linux", {}, "HOME/.cache/cem"),
        ("linux", {"XDG_CACHE_HOME": "/big"}, "/big/cem"),
        ("darwin", {"XDG_CACHE_HOME": "/big"}, "HOME/Library/Caches/cem"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/cem"),
        ("linux", {"CEM_CACHE": "/mine"}, "/mine"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of other systems")
def test_the_cache_lies_where_the_system_has_such_files(monkeypatch, platform, variables, place):
    for name in ("CEM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", platform)
    assert cache.folder() == Path(place.replace("HOME", str(Path.home())))
