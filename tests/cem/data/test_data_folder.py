"""Folders of images: layouts that are read and layouts that are refused, and what is said of either."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cem import attack, train
from cem.data import load_data, pixels
from cem.errors import DataError


def write(path, size=(8, 8), seed=None):
    """An image of its own at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = write.count = getattr(write, "count", 0) + 1
    levels = np.random.default_rng(number if seed is None else seed).integers(256, size=(*size[::-1], 3))
    Image.fromarray(levels.astype(np.uint8)).save(path)


def write_class_folders(root, count=10, size=(8, 8), below="", classes=("cat", "dog")):
    for name in classes:
        for number in range(count):
            write(root / name / below / f"{number}.png", size)


def write_tiny_imagenet(root):
    """The layout in which TinyImageNet is published, and its file of annotations."""
    write_class_folders(root / "train", below="images")
    for name in ("cat", "dog"):
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)  # unlabeled
    annotations = root / "val" / "val_annotations.txt"
    with open(annotations, "w") as lines:
        for number in range(6):
            Image.new("RGB", (8, 8), (0, 0, 40 * number)).save(root / "val" / "images" / f"val_{number}.JPEG")
            lines.write(f"val_{number}.JPEG\t{('dog', 'cat')[number % 2]}\t0\t32\t44\t62\n")
    return annotations


def sizes(data):
    return len(data.train), len(data.val), len(data.test)


def test_val_takes_the_place_of_test_when_its_classes_fit(tmp_path):
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val", count=3)
    (tmp_path / "test" / "images").mkdir(parents=True)  # unlabeled, as in TinyImageNet
    data = load_data("folder", tmp_path)
    assert len(data.test) == 6
    assert data.test.origin == "test"
    assert data.notes == (f"{tmp_path}: 26 images (26 .png) of 2 classes, 8×8 pixels; left out: the folder test",)


def test_tiny_imagenet_loads_as_it_is_published(tmp_path):
    write_tiny_imagenet(tmp_path)
    data = load_data("folder", tmp_path)
    assert data.class_names == ("cat", "dog")
    assert sizes(data) == (18, 2, 6)
    assert data.test.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert data.test.images[:, 2].float().mean((1, 2)).tolist() == pytest.approx([0, 40, 80, 120, 160, 200], abs=3)
    assert "(20 .png, 6 .jpeg)" in data.notes[0]
    assert data.notes[0].endswith("; left out: 2 .txt, the folder test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_3.JPEG cat", ", line 4: expected the name of an image, a tab and the name of one of the 2 class folders"),
        ("val_3.JPEG\tcow\t0\t0\t1\t1", r", line 4: .*, got 'val_3.JPEG\\tcow"),
        ("", ", line 4: .*, got ''"),
        ("val_9.JPEG\tcat", ", line 4: there is no image .*val_9"),
        ("\tcat", ", line 4: there is no image"),
        (None, ": expected a line for each image"),
    ],
    ids=["no tab", "unknown class", "blank", "no such image", "no name", "no lines"],
)
def test_annotations_that_cannot_be_used_are_named(tmp_path, line, message):
    annotations = write_tiny_imagenet(tmp_path)
    lines = annotations.read_text().splitlines()
    annotations.write_text("" if line is None else "\n".join([*lines[:3], line, *lines[4:]]))
    with pytest.raises(DataError, match=rf"val_annotations\.txt{message}"):
        load_data("folder", tmp_path)


def test_what_is_hidden_or_no_image_is_left_out_and_counted(tmp_path):
    write_class_folders(tmp_path)
    for place in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "__MACOSX/cat", "dog/@eaDir/0.png"):
        write(tmp_path / place / "0-copy.png")
    for place in ("cat/._0.png", "cat/Thumbs.db", "README.md", "dog/1.txt", "dog/2.txt", "dog/Makefile"):
        (tmp_path / place).write_text("no image")
    write(tmp_path / "alone.png")
    data = load_data("folder", tmp_path)
    assert data.class_names == ("cat", "dog")
    assert sum(sizes(data)) == 20
    left_out = data.notes[0].partition("; left out: ")[2].split(", ")
    assert left_out[:2] == ["6 hidden", "2 .txt"]
    assert {*left_out[2:]} == {"1 .md", "1 without a suffix", "1 in no class folder"}


def parts(root, *names, **options):
    for name in names:
        write_class_folders(root / name, **options)


def other(make):
    """In place of the folder of two classes, what ``make`` writes."""
    return lambda root: [shutil.rmtree(root), make(root)]


def image(change):
    """What ``change`` makes of an image that is away."""
    return lambda root: [(root / "cat" / "3.png").unlink(), change(root / "cat" / "3.png")]


REFUSED = {
    "missing": (shutil.rmtree, "there is no folder .*folder: expected one with train/CLASS"),
    "flat": (other(lambda root: [write(root / part / "0.png") for part in ("train", "test")]), "test, train, and no"),
    "other names": (other(lambda root: parts(root, "Training_Set", "valid")), "Training_Set, .*: expected train"),
    "parent": (other(lambda root: parts(root / "pets", "train", "test")), "pets is no class but a data set"),
    "parent beside classes": (lambda root: parts(root / "pets", "train", "val"), "pets is no class but a data set"),
    "one class in train": (other(lambda root: parts(root, "train", "test", classes=["a"])), "one class folder only, a"),
    "one class": (lambda root: shutil.rmtree(root / "dog"), "one class folder only, cat: expected two or more"),
    "images only": (other(lambda root: write(root / "0.png")), "no class folders, but 1 images"),
    "other classes in val": (
        other(lambda root: [parts(root, "train"), parts(root, "val", classes=["cat", "doge"])]),
        "no .*test; .*val lacks dog and has doge besides; .*If there are no test images, --data-root is .*train",
    ),
    "empty class": (lambda root: (root / "empty" / ".x").mkdir(parents=True), "class folders empty of .* at least one"),
    "empty image": (image(Path.touch), r"3\.png is not a readable image: it is none of BMP"),
    "links in a circle": (lambda root: (root / "cat" / "up").symlink_to(root), "leads back to .*cat, in which it lies"),
    "link to itself": (image(lambda path: path.symlink_to("3.png")), r"3\.png cannot be read: Too many levels"),
    "broken link": (image(lambda path: path.symlink_to("gone")), r"3\.png cannot be read: No such file"),
    "no file": (image(lambda path: getattr(os, "mkfifo", Path.mkdir)(path)), r"3\.png is not a regular file"),
    "too few": (lambda root: [path.unlink() for path in root.glob("*/[1-9].png")], "folder: 2 images are too few"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_folder_that_cannot_be_used_is_explained(tmp_path, change, message):
    write_class_folders(tmp_path / "folder")
    change(tmp_path / "folder")
    with pytest.raises(DataError, match=message):
        load_data("folder", tmp_path / "folder")


def test_a_part_by_its_name_alone_may_be_a_class(tmp_path):
    write_class_folders(tmp_path, classes=("train", "valley", "city"))
    assert load_data("folder", tmp_path).class_names == ("city", "train", "valley")


@pytest.mark.parametrize(
    ("last", "most", "asked", "shape", "said"),
    [
        ((10, 6), 3600, None, (3, 6, 10), "10×6 pixels$"),
        ((10, 6), 3600, 4, (3, 4, 4), "4×4 pixels, resized from 10×6$"),
        ((10, 6), 3599, None, (3, 64, 64), "64×64 pixels, resized from 10×6$"),
        ((6, 10), 3600, None, (3, 64, 64), "64×64 pixels, resized from 2 sizes$"),
        ((6, 10), 3600, 4, (3, 4, 4), "4×4 pixels, resized from 2 sizes$"),
    ],
    ids=["kept", "asked for", "too much memory", "differing", "differing, asked for"],
)
def test_a_size_that_all_images_have_is_kept_and_others_become_64(
    tmp_path, monkeypatch, last, most, asked, shape, said
):
    write_class_folders(tmp_path, size=(10, 6))
    write(tmp_path / "dog" / "9.png", last)
    monkeypatch.setattr(pixels, "LARGEST", most)
    data = load_data("folder", tmp_path, image_size=asked)
    assert data.image_shape == shape
    with Image.open(tmp_path / "cat" / "0.png") as first:
        expected = torch.from_numpy(np.array(first.resize(shape[:0:-1], Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert any((each.int() - expected.int()).abs().max() <= 1 for each in data.train.images)
    assert re.search(said, data.notes[0])


def test_images_that_are_in_two_sets_are_counted_whatever_train_size_leaves_of_them(tmp_path):
    for part, seeds in (("train", [*range(15), *range(5)]), ("test", [*range(15), 99])):
        for number, seed in enumerate(seeds):
            write(tmp_path / part / ("cat", "dog")[number % 2] / f"{number}.png", seed=seed)
    whole, few = load_data("folder", tmp_path), load_data("folder", tmp_path, train_size=2)
    in_train = {image.tobytes() for image in whole.train.images.numpy()}
    (in_val,) = {sum(image.tobytes() in in_train for image in whole.val.images.numpy())} - {0, 2}
    assert few.notes == whole.notes
    assert whole.notes[1] == (
        f"identical images: {in_val} of 2 validation images are training images too, "
        "15 of 16 test images are training or validation images too"
    )


@pytest.mark.slow
def test_trainings_and_attacks_say_what_was_read(tmp_path, run):
    write_class_folders(tmp_path / "images", count=20)
    line = f"--data=folder --data-root={tmp_path / 'images'} --train-size=4 --surrogate=none --epochs=1 --device=cpu"
    assert f"\n{tmp_path / 'images'}: 40 images" in run(train, line.split(), tmp_path / "run").err
    line = f"{tmp_path / 'run'} --attacks decoder --decoder.networks=deconvC4 --decoder.max-cycles=1"
    assert f"\n{tmp_path / 'images'}: 40 images" in run(attack, line.split()).err
