from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from cem.data import load_data
from cem.data.synthetic import make_test_images, write_test_images
from cem.errors import DataError, UsageError


def write_idx_files(root):
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 50)):
        images = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
            (root / f"{prefix}-{name}-ubyte").write_bytes(content)


@pytest.fixture(scope="module", params=["digits", "mnist", "folder", "folder without test"])
def source(request, tmp_path_factory):
    name, root = request.param, tmp_path_factory.mktemp("data")
    if name == "mnist":
        write_idx_files(root)
    elif "folder" in name:
        write_test_images(root, train_per_class=25, test_per_class=5, image_size=8)
    return name.split()[0], root / "train" if "without" in name else root


@pytest.fixture(scope="module")
def whole(source):
    return load_data(*source)


def keys(image_set):
    return {(image_set.origin, index) for index in image_set.indices.tolist()}


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) and a.origin == b.origin


def test_train_val_and_test_are_disjoint_and_nothing_is_lost(whole):
    sets = [keys(part) for part in (whole.train, whole.val, whole.test)]
    assert [len(part) for part in sets] == [len(whole.train), len(whole.val), len(whole.test)]
    assert len(set.union(*sets)) == sum(len(part) for part in sets)
    for origin in {origin for part in sets for origin, _ in part}:
        indices = sorted(index for part in sets for o, index in part if o == origin)
        assert indices == list(range(len(indices)))


def test_the_split_is_the_same_whatever_the_seed_and_train_size_limits_training_images_only(source, whole):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    limited = load_data(*source, train_size=30)
    assert len(limited.train) == 30
    assert keys(limited.train) < keys(whole.train)
    assert equal(limited.val, whole.val)
    assert equal(limited.test, whole.test)
    assert (limited.mean, limited.std) == (whole.mean, whole.std)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert equal(load_data(*source, train_size=30).train, limited.train)
    share = whole.train.labels.bincount() / len(whole.train)
    for part in (limited.train, whole.val):  # every class in proportion
        assert (part.labels.bincount(minlength=whole.num_classes) - share * len(part)).abs().max() <= 1


def test_description_fits_the_images(whole):
    assert whole.image_shape == tuple(whole.test.images.shape[1:])
    assert whole.num_classes == len(whole.class_names) == int(whole.train.labels.max()) + 1
    images = whole.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(whole.mean).double(), images.mean((0, 2, 3)))
    std = images.std((0, 2, 3), correction=0).clamp(min=1 / 255)
    torch.testing.assert_close(torch.tensor(whole.std).double(), std)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("imagenet", {}, r"digits, fashion-mnist, .*folder, got 'imagenet'"),
        ("digits", {"train_size": 0}, r"train_size must be in 1\.\.1294 for digits, got 0"),
        ("digits", {"train_size": 1295}, r"train_size must be in 1\.\.1294 for digits, got 1295"),
        ("digits", {"image_size": 0}, "image_size must be at least 1"),
        ("digits", {"augment": True}, "defined for cifar10, cifar100, svhn, folder only, got 'digits'"),
    ],
)
def test_unusable_arguments_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        load_data(name, **options)


def test_digits_use_the_whole_range():
    data = load_data("digits")
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    assert len(data.train.images.unique()) == 17
    assert data.train.images.max() == 255


def test_images_are_resized_and_all_but_one_may_be_trained_on():
    data = load_data("digits", image_size=12, train_size=1293)
    assert data.train.images.shape == (1293, 1, 12, 12)
    assert data.test.images.shape == (359, 1, 12, 12)


@pytest.mark.parametrize(("place", "root"), [("FashionMNIST/raw", "."), ("data/fashion-mnist", None)])
def test_idx_files_are_read_to_the_pixel_where_torchvision_puts_them_or_by_default(tmp_path, monkeypatch, place, root):
    write_idx_files(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    test = load_data("fashion-mnist", root).test
    assert test.images.numpy().tobytes() == (tmp_path / place / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert test.labels.tolist() == [index % 10 for index in range(50)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"train-labels-idx1-ubyte\[\.gz\] is neither in .*--download"),
        (lambda path: path.write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 100)) + bytes(100)), r"200 images, .* 100 labels"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x0b"), r"labels 0\.\.9, got 11 for image 199$"),
    ],
    ids=["missing", "of another length", "a label beyond the classes"],
)
def test_a_file_of_labels_that_does_not_fit_is_named(tmp_path, damage, message):
    write_idx_files(tmp_path)
    damage(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match=message):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize(("name", "place"), [("cifar10", "cifar-10-batches-py"), ("svhn", "32x32.mat")])
def test_missing_torchvision_data_set_says_where_it_was_looked_for(name, place, tmp_path):
    with pytest.raises(DataError, match=rf"{place}.*--download"):
        load_data(name, tmp_path)


@pytest.mark.parametrize(("name", "dataset"), [("mnist", "MNIST"), ("cifar100", "CIFAR100"), ("svhn", "SVHN")])
def test_download_that_fails_says_why(name, dataset, tmp_path, monkeypatch):
    unreachable = Mock(side_effect=URLError("no route to host"), base_folder="folder", classes=[])
    monkeypatch.setattr(datasets, dataset, unreachable)
    with pytest.raises(DataError, match=f"cannot fetch {tmp_path}.*no route to host"):
        load_data(name, tmp_path, download=True)


def fake_torchvision(monkeypatch, images, labels):
    """Let CIFAR-10 and SVHN hold these, in the layouts that torchvision gives them."""
    array = images.permute(0, 2, 3, 1).numpy()
    cifar = SimpleNamespace(data=array, targets=labels.tolist(), classes=list("abcdefghij"))
    svhn = SimpleNamespace(data=images.numpy(), labels=labels.numpy())
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: cifar)
    monkeypatch.setattr(datasets, "SVHN", lambda *_, **__: svhn)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_torchvision_arrays_become_channels_first_images(name, tmp_path, monkeypatch):
    images, labels = make_test_images(10, 4)
    fake_torchvision(monkeypatch, images, labels)
    data = load_data(name, tmp_path)
    assert torch.equal(data.test.images, images)
    assert torch.equal(data.test.labels, labels)
    assert data.test.images.is_contiguous()


@pytest.mark.parametrize(("name", "mirrored"), [("cifar10", True), ("svhn", False)])
def test_training_images_only_are_shifted_and_mirrored_unless_they_are_house_numbers(
    name, mirrored, tmp_path, monkeypatch
):
    images = (8 * torch.arange(32, dtype=torch.uint8)).expand(40, 3, 32, 32).contiguous()  # brighter to the right
    fake_torchvision(monkeypatch, images, torch.arange(40) % 10)
    torch.manual_seed(0)
    data = load_data(name, tmp_path, augment=True)
    read, _ = data.train.__getitems__(range(36))
    assert read.shape == (36, 3, 32, 32)
    middle = read[:, 0, 16, 8:24]
    assert len(middle[:, 0].unique()) > 4
    assert bool((middle[:, -1] < middle[:, 0]).any()) == mirrored
    assert data.val.augment is data.test.augment is None
