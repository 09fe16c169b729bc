import gzip
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from cem.data import DATASETS, DataSplits, ImageSet, load_data
from cem.data.synthetic import make_test_images, write_test_images
from cem.errors import DataError, UsageError


def write_idx_files(root: Path, *, zipped: bool = False, train: int = 200, test: int = 50) -> None:
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
            path = root / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


def write_class_folders(root: Path, count: int = 10, size: tuple[int, int] = (8, 8)) -> None:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (100 * label, number, 0)).save(root / name / f"{number}.png")


@pytest.fixture(params=["digits", "fashion-mnist", "mnist", "folder", "folder without test"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    name = request.param
    if name in ("fashion-mnist", "mnist"):
        write_idx_files(tmp_path, zipped=name == "mnist")
    elif name == "folder":
        write_test_images(tmp_path, train_per_class=20, test_per_class=5, image_size=8)
    elif name == "folder without test":
        write_class_folders(tmp_path, count=50)
    return name.split()[0], tmp_path


def keys(image_set: ImageSet) -> set[tuple[str, int]]:
    return {(image_set.origin, index) for index in image_set.indices.tolist()}


def equal(a: ImageSet, b: ImageSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) and a.origin == b.origin


def test_train_val_and_test_are_disjoint_and_nothing_is_lost(source: tuple[str, Path]) -> None:
    data = load_data(*source)
    sets = [keys(part) for part in (data.train, data.val, data.test)]
    assert [len(part) for part in sets] == [len(data.train), len(data.val), len(data.test)]
    assert len(set.union(*sets)) == sum(len(part) for part in sets)
    for origin in {origin for part in sets for origin, _ in part}:
        indices = sorted(index for part in sets for o, index in part if o == origin)
        assert indices == list(range(len(indices)))


def test_loading_twice_gives_the_same_split_whatever_the_seed(source: tuple[str, Path]) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = load_data(*source)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    second = load_data(*source)
    for part in ("train", "val", "test"):
        assert equal(getattr(first, part), getattr(second, part))


def test_every_part_has_every_class_in_proportion(source: tuple[str, Path]) -> None:
    data = load_data(*source, train_size=30)
    whole = load_data(*source).train.labels.bincount() / len(load_data(*source).train)
    for part in (data.train, data.val):
        expected = whole * len(part)
        assert (part.labels.bincount(minlength=data.num_classes) - expected).abs().max() <= 1


def test_train_size_limits_training_images_only(source: tuple[str, Path]) -> None:
    full, limited = load_data(*source), load_data(*source, train_size=30)
    assert len(limited.train) == 30
    assert keys(limited.train) < keys(full.train)
    assert equal(limited.val, full.val)
    assert equal(limited.test, full.test)
    assert (limited.mean, limited.std) == (full.mean, full.std)


def test_description_fits_the_images(source: tuple[str, Path]) -> None:
    data = load_data(*source)
    assert data.image_shape == tuple(data.test.images.shape[1:])
    assert data.num_classes == len(data.class_names) == int(data.train.labels.max()) + 1
    images = data.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(data.mean).double(), images.mean((0, 2, 3)))
    std = images.std((0, 2, 3), correction=0).clamp(min=1 / 255)
    torch.testing.assert_close(torch.tensor(data.std).double(), std)


@pytest.mark.parametrize("train_size", [0, 1295])
def test_impossible_train_size_is_refused(train_size: int) -> None:
    with pytest.raises(UsageError, match=rf"train_size must be in 1\.\.1294 for digits, got {train_size}"):
        load_data("digits", train_size=train_size)


def test_train_size_may_leave_a_single_image_out() -> None:
    assert len(load_data("digits", train_size=1293).train) == 1293


def test_digits_use_the_whole_range() -> None:
    data = load_data("digits")
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    assert len(data.train.images.unique()) == 17
    assert data.train.images.max() == 255


def test_image_size_resizes() -> None:
    data = load_data("digits", image_size=12)
    assert data.image_shape == (1, 12, 12)
    assert data.test.images.shape[-1] == 12


def test_mnist_files_are_found_where_torchvision_puts_them(tmp_path: Path) -> None:
    write_idx_files(tmp_path / "FashionMNIST" / "raw")
    assert len(load_data("fashion-mnist", tmp_path).test) == 50


def test_pixels_survive_the_idx_format(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    test = load_data("fashion-mnist", tmp_path).test
    raw = (tmp_path / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert test.images.numpy().tobytes() == raw
    assert test.labels.tolist() == [index % 10 for index in range(50)]


def test_missing_mnist_file_is_named(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\[\.gz\] is neither in .*--download"):
        load_data("mnist", tmp_path)


def test_mnist_files_of_different_length_are_refused(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    write_idx_files(tmp_path / "other", train=100)
    name = "train-labels-idx1-ubyte"
    (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(DataError, match=r"200 images, .* 100 labels"):
        load_data("mnist", tmp_path)


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(DataError, match=r"expected labels 0\.\.9"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize(("name", "place"), [("cifar10", "cifar-10-batches-py"), ("svhn", "32x32.mat")])
def test_missing_torchvision_data_set_says_where_it_was_looked_for(name: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{place}.*--download"):
        load_data(name, tmp_path)


@pytest.mark.parametrize(("name", "dataset"), [("mnist", "MNIST"), ("cifar100", "CIFAR100"), ("svhn", "SVHN")])
def test_download_that_fails_says_why(name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    unreachable.base_folder = "folder"  # type: ignore[attr-defined]
    unreachable.classes = []  # type: ignore[attr-defined]
    monkeypatch.setattr(datasets, dataset, unreachable)
    with pytest.raises(DataError, match=f"cannot fetch {tmp_path}.*no route to host"):
        load_data(name, tmp_path, download=True)


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, images: Tensor, labels: Tensor) -> None:
    """Let CIFAR-10 and SVHN hold these, in the layouts that torchvision gives them."""
    cifar = SimpleNamespace(
        data=images.permute(0, 2, 3, 1).numpy(), targets=labels.tolist(), classes=list("abcdefghij")
    )
    svhn = SimpleNamespace(data=images.numpy(), labels=labels.numpy())
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: cifar)
    monkeypatch.setattr(datasets, "SVHN", lambda *_, **__: svhn)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_torchvision_arrays_become_channels_first_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = make_test_images(10, 4)
    fake_torchvision(monkeypatch, images, labels)
    data = load_data(name, tmp_path)
    assert torch.equal(data.test.images, images)
    assert torch.equal(data.test.labels, labels)
    assert data.test.images.is_contiguous()


def test_val_takes_the_place_of_test_when_its_classes_fit(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val", count=3)
    (tmp_path / "test" / "images").mkdir(parents=True)  # unlabeled, as in TinyImageNet
    data = load_data("folder", tmp_path)
    assert len(data.test) == 6
    assert data.test.origin == "test"
    assert data.image_shape == (3, 64, 64)


def write_tiny_imagenet(root: Path) -> Path:
    """The layout in which TinyImageNet is published, and its file of annotations."""
    for label, name in enumerate(("n01", "n02")):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        for number in range(10):
            image = Image.new("RGB", (8, 8), (100 * label, number, 0))
            image.save(root / "train" / name / "images" / f"{name}_{number}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)  # unlabeled
    annotations = root / "val" / "val_annotations.txt"
    with open(annotations, "w") as lines:
        for number in range(6):
            Image.new("RGB", (8, 8), (0, 0, 40 * number)).save(root / "val" / "images" / f"val_{number}.JPEG")
            lines.write(f"val_{number}.JPEG\tn0{2 - number % 2}\t0\t32\t44\t62\n")
    return annotations


def test_tiny_imagenet_loads_as_it_is_published(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    data = load_data("folder", tmp_path, image_size=8)
    assert data.class_names == ("n01", "n02")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 6)
    assert data.test.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert data.test.images[:, 2].float().mean((1, 2)).tolist() == pytest.approx([0, 40, 80, 120, 160, 200], abs=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_3.JPEG n01", "expected the name of an image, a tab and the name of one of the 2 class folders"),
        ("val_3.JPEG\tn03\t0\t0\t1\t1", r".*, got 'val_3.JPEG\\tn03"),
        ("", ".*, got ''"),
        ("val_9.JPEG\tn01", "there is no image .*val_9"),
        ("\tn01", "there is no image"),
    ],
    ids=["no tab", "unknown class", "blank", "no such image", "no name"],
)
def test_line_of_annotations_that_cannot_be_used_is_named(tmp_path: Path, line: str, message: str) -> None:
    annotations = write_tiny_imagenet(tmp_path)
    lines = annotations.read_text().splitlines()
    annotations.write_text("\n".join([*lines[:3], line, *lines[4:]]))
    with pytest.raises(DataError, match=rf"val_annotations\.txt, line 4: {message}"):
        load_data("folder", tmp_path)


def test_empty_annotations_are_refused(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path).write_text("")
    with pytest.raises(DataError, match=r"val_annotations\.txt: expected a line for each image"):
        load_data("folder", tmp_path)


def test_test_classes_must_be_those_of_train(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train has 2 class folders, but neither .*test nor .*val"):
        load_data("folder", tmp_path)


def test_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no class folders at .*nowhere: expected .*train/CLASS"):
        load_data("folder", tmp_path / "nowhere")


def test_class_without_images_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        load_data("folder", tmp_path)


@pytest.mark.parametrize("length", [0, 40])
def test_broken_image_is_named(tmp_path: Path, length: int) -> None:
    write_class_folders(tmp_path, size=(32, 32))
    path = tmp_path / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"3\.png is not a readable image"):
        load_data("folder", tmp_path)


def test_too_few_images_to_split_are_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=1)
    with pytest.raises(DataError, match="2 images are too few"):
        load_data("folder", tmp_path)


def test_augmentation_is_for_training_images_only(tmp_path: Path) -> None:
    write_test_images(tmp_path, image_size=16)
    torch.manual_seed(0)
    data = load_data("folder", tmp_path, image_size=16, augment=True)
    assert data.val.augment is None
    assert data.test.augment is None
    read, _ = data.train.__getitems__(range(20))
    assert read.shape == (20, 3, 16, 16)
    assert (read != data.train.images[:20] / 255).flatten(1).any(1).sum() >= 15


@pytest.mark.parametrize(("name", "mirrored"), [("cifar10", True), ("svhn", False)])
def test_house_numbers_are_shifted_but_not_mirrored(
    name: str, mirrored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = (8 * torch.arange(32, dtype=torch.uint8)).expand(40, 3, 32, 32).contiguous()  # brighter to the right
    fake_torchvision(monkeypatch, images, torch.arange(40) % 10)
    torch.manual_seed(0)
    read, _ = load_data(name, tmp_path, augment=True).train.__getitems__(range(36))
    middle = read[:, 0, 16, 8:24]
    assert len(middle[:, 0].unique()) > 4
    assert bool((middle[:, -1] < middle[:, 0]).any()) == mirrored


def test_augmentation_of_data_without_one_is_refused() -> None:
    with pytest.raises(UsageError, match="defined for cifar10, cifar100, svhn, folder only, got 'digits'"):
        load_data("digits", augment=True)


def test_unknown_data_set_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"digits, fashion-mnist, .*folder, got 'imagenet'"):
        load_data("imagenet")
    assert len(DATASETS) == 7


def test_image_size_must_be_positive() -> None:
    with pytest.raises(UsageError, match="image_size must be at least 1"):
        load_data("digits", image_size=0)


def test_default_root_is_data_and_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_files(tmp_path / "data" / "mnist")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_data("mnist"), DataSplits)
