"""The data set of 100 classes that is made of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.garment_pairs import make_pairs, write_pairs
from cem.data.files import read_folder


def garments(count: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one gray level each, four times their label."""
    labels = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(1))
    return (4 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 6, 6), labels


def test_a_pair_shows_both_garments_and_its_class_names_them_in_order() -> None:
    pairs, labels = make_pairs(*garments())
    assert (pairs.shape, labels.shape) == ((20, 1, 6, 6), (20,))
    left, right = pairs[..., :3], pairs[..., 3:]
    for side, label in ((left, labels // 10), (right, labels % 10)):
        assert torch.equal(side, (4 * label).to(torch.uint8)[:, None, None, None].expand_as(side))


def test_every_garment_is_used_once() -> None:
    labels = torch.arange(40) % 10
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    pairs, _ = make_pairs(images, labels)
    assert sorted(pairs[:, 0, 0].flatten().tolist()) == list(range(40))


def test_columns_are_averaged_two_by_two() -> None:
    image = torch.tensor([[10, 20, 0, 255]], dtype=torch.uint8)[None].expand(2, 1, 1, 4)
    pairs, _ = make_pairs(image, torch.zeros(2, dtype=torch.long))
    assert pairs.flatten().tolist() == [15, 128, 15, 128]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    pairs, labels = make_pairs(*garments(400))
    for part in ("train", "test"):
        write_pairs(pairs, labels, tmp_path / part)
    files = read_folder(tmp_path, 6)
    names = [f"{label // 10}-{label % 10}" for label in labels.tolist()]
    assert files.class_names == tuple(sorted(set(names)))
    images, found = files.train
    order = torch.tensor(sorted(range(len(names)), key=lambda at: (names[at], at)))
    assert [files.class_names[each] for each in found] == [names[at] for at in order]
    assert torch.equal(images, pairs[order].expand(-1, 3, -1, -1))
