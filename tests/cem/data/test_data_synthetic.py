import signal
import zlib
from pathlib import Path

import pytest
import torch

from cem.data import load_data
from cem.data.synthetic import main, make_test_images, write_test_images
from cem.errors import UsageError


def test_shapes_types_and_labels() -> None:
    images, labels = make_test_images(3, 5, (1, 8, 12))
    assert images.shape == (15, 1, 8, 12)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_the_same_seed_gives_the_same_images_and_another_seed_others() -> None:
    assert torch.equal(make_test_images(seed=3)[0], make_test_images(seed=3)[0])
    assert not torch.equal(make_test_images(seed=3)[0], make_test_images(seed=4)[0])


def test_the_default_images_are_these() -> None:
    # A fixed value: what is measured on these images must mean the same on every machine and version.
    images, _ = make_test_images()
    assert zlib.crc32(images.numpy().tobytes()) == 2433322901


def test_generating_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    make_test_images()
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_can_be_told_apart() -> None:
    """A nearest-mean classifier on the spectra, which do not depend on where the stripes begin."""

    def spectra(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = make_test_images(8, 16, seed=seed)
        return torch.fft.rfft2(images / 255).abs().flatten(1), labels

    train, train_labels = spectra(0)
    test, test_labels = spectra(1)
    means = torch.stack([train[train_labels == label].mean(0) for label in range(8)])
    assert (torch.cdist(test, means).argmin(1) == test_labels).float().mean() > 0.95


@pytest.mark.parametrize("sizes", [(0, 1, (3, 8, 8)), (1, 0, (3, 8, 8)), (1, 1, (3, 0, 8))])
def test_empty_sizes_are_refused(sizes: tuple) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        make_test_images(*sizes)


def test_a_written_folder_reads_back_without_loss(tmp_path: Path) -> None:
    write_test_images(tmp_path, num_classes=3, train_per_class=10, test_per_class=2, image_size=16)
    data = load_data("folder", tmp_path, image_size=16)
    images, labels = make_test_images(3, 12, (3, 16, 16))
    in_train = torch.arange(36) % 12 < 10

    for image_set in (data.train, data.val):
        assert torch.equal(image_set.images, images[in_train][image_set.indices])
        assert torch.equal(image_set.labels, labels[in_train][image_set.indices])
    assert torch.equal(data.test.images, images[~in_train][data.test.indices])
    assert data.class_names == ("class000", "class001", "class002")


def test_writing_into_a_folder_with_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match="has images already"):
        write_test_images(tmp_path)


@pytest.fixture(autouse=True)
def _own_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)


SMALL = ["--num-classes", "2", "--train-per-class", "3", "--test-per-class", "1", "--image-size", "8"]


def test_command_line_writes_a_folder(tmp_path: Path) -> None:
    assert main([str(tmp_path / "out"), *SMALL]) == 0
    assert len(list(tmp_path.glob("out/train/*/*.png"))) == 6
    assert len(list(tmp_path.glob("out/test/*/*.png"))) == 2


def test_command_line_will_not_write_a_folder_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path), *SMALL])
    assert main([str(tmp_path), *SMALL]) == 2
    assert "has images already" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--num-classes", "--train-per-class", "--test-per-class", "--image-size"])
def test_command_line_refuses_sizes_below_1_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main([str(tmp_path / "out"), *SMALL, option, "0"]) == 2
    assert f"error: {option} must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_command_line_refuses_a_file_in_place_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([str(tmp_path / out), *SMALL]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_command_line_says_that_a_folder_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: bool) -> None:
        raise PermissionError(f"Permission denied: {path}")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main([str(tmp_path / "out"), *SMALL]) == 2
    assert f"error: cannot write images to {tmp_path / 'out'}: Permission denied" in capsys.readouterr().err
