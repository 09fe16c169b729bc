import pickle

import pytest
import torch

from cem.data import ImageSet, make_loader


def image_set(count: int = 10, **options) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 4, 5), generator=generator).to(torch.uint8)
    return ImageSet(images, torch.arange(count) % 3, torch.arange(count) + 100, "train", **options)


def invert(image: torch.Tensor) -> torch.Tensor:
    return 255 - image


def jitter(image: torch.Tensor) -> torch.Tensor:
    return image.roll(int(torch.randint(5, ())), dims=-1)


def test_pixels_are_scaled_to_the_unit_interval() -> None:
    data = image_set()
    image, label = data[3]
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, data.images[3] / 255)
    assert label.dtype == torch.int64
    assert label == 0


def test_a_batch_equals_its_items() -> None:
    data = image_set()
    positions = [4, 0, 4, 9]
    images, labels = data.__getitems__(positions)
    assert torch.equal(images, torch.stack([data[position][0] for position in positions]))
    assert torch.equal(labels, torch.stack([data[position][1] for position in positions]))


def test_subset_keeps_indices_origin_and_augmentation() -> None:
    subset = image_set(augment=invert).subset([7, 2]).subset(torch.tensor([1]))
    assert subset.indices.tolist() == [102]
    assert subset.labels.tolist() == [2]
    assert subset.origin == "train"
    assert subset.augment is invert


def test_augmentation_reaches_every_read_and_leaves_the_images_alone() -> None:
    data = image_set(augment=invert)
    before = data.images.clone()
    images, _ = data.__getitems__([0, 1])
    torch.testing.assert_close(images, (255 - before[:2]) / 255)
    assert torch.equal(data.images, before)


def test_augmentation_draws_for_each_image_anew_from_torchs_generator() -> None:
    data = image_set(augment=jitter).subset([0] * 16)
    torch.manual_seed(1)
    first, _ = data.__getitems__(range(16))
    torch.manual_seed(1)
    again, _ = data.__getitems__(range(16))
    assert torch.equal(first, again)
    assert any(not torch.equal(first[0], image) for image in first[1:])


def test_loader_keeps_the_partial_batch() -> None:
    sizes = [len(labels) for _, labels in make_loader(image_set(10), 4, shuffle=False)]
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (5, 4, [5]), (1, 4, [1]), (3, 1, [1, 1, 1])],
)
def test_lone_last_sample_joins_the_batch_before_it_when_shuffled(
    count: int, batch_size: int, sizes: list[int]
) -> None:
    loader = make_loader(image_set(count), batch_size, shuffle=True)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_shuffled_loader_gives_every_sample_once() -> None:
    data = image_set(9)
    images = torch.cat([images for images, _ in make_loader(data, 4, shuffle=True)])
    assert sorted(images.flatten(1).tolist()) == sorted((data.images / 255).flatten(1).tolist())


def test_lone_last_sample_stays_alone_in_order() -> None:
    assert [len(labels) for _, labels in make_loader(image_set(9), 4, shuffle=False)] == [4, 4, 1]


def test_unshuffled_loader_reads_in_order() -> None:
    data = image_set()
    images = torch.cat([images for images, _ in make_loader(data, 4, shuffle=False)])
    torch.testing.assert_close(images, data.images / 255)


def test_shuffled_loader_follows_its_generator() -> None:
    def passes(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        loader = make_loader(image_set(64), 16, shuffle=True, generator=generator)
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    first, second = passes(0)
    assert torch.equal(first, passes(0)[0])
    assert torch.equal(second, passes(0)[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, passes(1)[0])


def test_worker_processes_give_the_same_batches() -> None:
    data = image_set()
    for (here, _), (there, _) in zip(
        make_loader(data, 4, shuffle=False), make_loader(data, 4, shuffle=False, num_workers=1), strict=True
    ):
        assert torch.equal(here, there)


def test_worker_processes_give_the_same_shuffled_batches() -> None:
    def passes(num_workers: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        loader = make_loader(image_set(), 4, shuffle=True, generator=generator, num_workers=num_workers)
        return [images for _ in range(2) for images, _ in loader]

    assert all(map(torch.equal, passes(0), passes(1)))


def test_set_and_loader_function_can_be_pickled() -> None:
    loader = make_loader(image_set(), 4, shuffle=False)
    assert pickle.loads(pickle.dumps(loader.collate_fn)) is loader.collate_fn
    assert torch.equal(pickle.loads(pickle.dumps(loader.dataset)).images, image_set().images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 5)}, r"images must be uint8 \[N, C, H, W\], got torch.float32"),
        ({"images": torch.zeros(2, 4, 5, dtype=torch.uint8)}, r"got torch.uint8 \(2, 4, 5\)"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"labels must be int64 \[2\], got torch.int64 \(3,\)",
        ),
        ({"labels": torch.zeros(2)}, r"labels must be int64 \[2\], got torch.float32"),
        ({"indices": torch.zeros(1, dtype=torch.int64)}, r"indices must be int64 \[2\]"),
    ],
)
def test_tensors_of_another_form_are_refused(change: dict, message: str) -> None:
    good = {
        "images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8),
        "labels": torch.zeros(2, dtype=torch.int64),
        "indices": torch.arange(2),
        "origin": "all",
    }
    with pytest.raises(ValueError, match=message):
        ImageSet(**{**good, **change})
