import pickle

import pytest
import torch

from cem.data import ImageSet, make_loader


def image_set(count=10, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 4, 5), generator=generator).to(torch.uint8)
    return ImageSet(images, torch.arange(count) % 3, torch.arange(count) + 100, "train", **options)


def jitter(image):
    return image.roll(int(torch.randint(5, ())), dims=-1)


def test_batches_and_items_are_pixels_in_the_unit_interval_and_labels():
    data, positions = image_set(), [4, 0, 4, 9]
    images, labels = data.__getitems__(positions)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(images, data.images[positions] / 255)
    assert torch.equal(labels, data.labels[positions])
    image, label = data[9]
    assert torch.equal(image, images[3])
    assert torch.equal(label, labels[3])


def test_subset_keeps_indices_origin_and_augmentation():
    subset = image_set(augment=jitter).subset([7, 2]).subset(torch.tensor([1]))
    assert subset.indices.tolist() == [102]
    assert subset.labels.tolist() == [2]
    assert subset.origin == "train"
    assert subset.augment is jitter


def test_augmentation_draws_for_each_image_anew_from_torchs_generator_and_leaves_the_images_alone():
    data = image_set(augment=jitter).subset([0] * 16)
    before = data.images.clone()
    torch.manual_seed(1)
    first, _ = data.__getitems__(range(16))
    torch.manual_seed(1)
    again, _ = data.__getitems__(range(16))
    assert torch.equal(first, again)
    assert any(not torch.equal(first[0], image) for image in first[1:])
    assert torch.equal(data.images, before)


@pytest.mark.parametrize(
    ("shuffle", "count", "batch_size", "sizes"),
    [
        (False, 10, 4, [4, 4, 2]),
        (False, 9, 4, [4, 4, 1]),
        (True, 9, 4, [4, 5]),
        (True, 10, 4, [4, 4, 2]),
        (True, 5, 4, [5]),
        (True, 1, 4, [1]),
        (True, 3, 1, [1, 1, 1]),
    ],
)
def test_every_sample_comes_once_and_a_lone_last_one_joins_the_batch_before_it_when_shuffled(
    shuffle, count, batch_size, sizes
):
    data = image_set(count)
    loader = make_loader(data, batch_size, shuffle=shuffle)
    batches = [images for images, _ in loader]
    assert [len(images) for images in batches] == sizes
    assert len(loader) == len(sizes)
    read, expected = torch.cat(batches), data.images / 255
    if shuffle:
        read, expected = (each.flatten(1)[each[:, 0, 0, 0].argsort()] for each in (read, expected))
    torch.testing.assert_close(read, expected)


def test_shuffled_loader_follows_its_generator_and_worker_processes_do_not_change_it():
    def passes(seed, num_workers=0):
        generator = torch.Generator().manual_seed(seed)
        loader = make_loader(image_set(64), 16, shuffle=True, generator=generator, num_workers=num_workers)
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    first, second = passes(0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, passes(1)[0])
    for again in (passes(0), passes(0, num_workers=1)):
        assert torch.equal(first, again[0])
        assert torch.equal(second, again[1])


def test_set_and_loader_function_can_be_pickled():
    loader = make_loader(image_set(), 4, shuffle=False)
    assert pickle.loads(pickle.dumps(loader.collate_fn)) is loader.collate_fn
    assert torch.equal(pickle.loads(pickle.dumps(loader.dataset)).images, image_set().images)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("images", torch.zeros(2, 3, 4, 5), r"images must be uint8 \[N, C, H, W\], got torch.float32"),
        ("images", torch.zeros(2, 4, 5, dtype=torch.uint8), r"got torch.uint8 \(2, 4, 5\)"),
        ("labels", torch.zeros(3, dtype=torch.int64), r"labels must be int64 \[2\], got torch.int64 \(3,\)"),
        ("labels", torch.zeros(2), r"labels must be int64 \[2\], got torch.float32"),
        ("indices", torch.zeros(1, dtype=torch.int64), r"indices must be int64 \[2\]"),
    ],
)
def test_tensors_of_another_form_are_refused(name, tensor, message):
    good = {"images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8), "labels": torch.arange(2), "indices": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        ImageSet(**{**good, name: tensor}, origin="all")
