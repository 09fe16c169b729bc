import re
import zlib

import pytest
import torch

from cem.data import load_data, synthetic
from cem.data.synthetic import make_test_images, write_test_images
from cem.errors import UsageError


def test_the_default_images_are_these_another_seed_gives_others_and_the_global_generator_none():
    before = torch.get_rng_state()
    images, _ = make_test_images()
    # A fixed value: what is measured on these images must mean the same on every machine and version.
    assert zlib.crc32(images.numpy().tobytes()) == 2433322901
    assert not torch.equal(images, make_test_images(seed=4)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sizes", [(0, 1, (3, 8, 8)), (1, 0, (3, 8, 8)), (1, 1, (3, 0, 8))])
def test_empty_sizes_are_refused(sizes):
    with pytest.raises(UsageError, match="at least 1"):
        make_test_images(*sizes)


def test_a_written_folder_reads_back_without_loss(tmp_path):
    write_test_images(tmp_path, num_classes=3, train_per_class=10, test_per_class=2, image_size=16)
    data = load_data("folder", tmp_path, image_size=16)
    images, labels = make_test_images(3, 12, (3, 16, 16))
    in_train = torch.arange(36) % 12 < 10

    for image_set in (data.train, data.val):
        assert torch.equal(image_set.images, images[in_train][image_set.indices])
        assert torch.equal(image_set.labels, labels[in_train][image_set.indices])
    assert torch.equal(data.test.images, images[~in_train][data.test.indices])
    assert data.class_names == ("class000", "class001", "class002")


SMALL = ["--num-classes", "2", "--train-per-class", "3", "--test-per-class", "1", "--image-size", "8"]


def test_command_line_writes_a_folder_but_not_twice(tmp_path, run):
    assert run(synthetic, [str(tmp_path / "out"), *SMALL]).code == 0
    assert [len(list(tmp_path.glob(f"out/{name}/*/*.png"))) for name in ("train", "test")] == [6, 2]
    assert "has images already" in run(synthetic, [str(tmp_path / "out"), *SMALL]).err


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("out", ["--image-size", "0"], "--image-size must be at least 1, got 0"),
        ("file", [], ".*file is a file"),
        ("file/below", [], "cannot write images to .*below: "),
    ],
)
def test_command_line_refuses_in_one_line_and_writes_nothing(tmp_path, run, out, options, message):
    (tmp_path / "file").write_text("mine")
    refused = run(synthetic, [str(tmp_path / out), *SMALL, *options])
    assert refused.code == 2
    assert re.match(f"error: {message}", refused.err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
