"""Which images whom: nobody is judged on what they have seen."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from cem.attacks.splits import AttackSplits, attack_splits, identities, pick, varied
from cem.data import DataSplits, ImageSet, load_data
from cem.errors import UsageError


@pytest.fixture(scope="module")
def everything() -> DataSplits:
    return load_data("digits")


@pytest.fixture(scope="module")
def target() -> DataSplits:
    return load_data("digits", train_size=700)


def test_the_four_sets_share_no_image(target: DataSplits, everything: DataSplits) -> None:
    splits = attack_splits(target, everything)
    for one, other in combinations(vars(splits).values(), 2):
        assert not identities(one) & identities(other)


def test_no_image_is_lost(target: DataSplits, everything: DataSplits) -> None:
    splits = attack_splits(target, everything)
    assert sum(splits.sizes().values()) == 1797
    assert splits.sizes() == {"target_train": 700, "attacker_train": 591, "attacker_val": 147, "test": 359}


def test_the_target_keeps_its_own_sets(target: DataSplits, everything: DataSplits) -> None:
    splits = attack_splits(target, everything)
    assert torch.equal(splits.target_train.indices, target.train.indices)
    assert torch.equal(splits.test.indices, target.test.indices)


def test_a_target_that_used_all_training_images_leaves_its_validation_images(everything: DataSplits) -> None:
    splits = attack_splits(everything, everything)
    assert identities(splits.attacker_train) | identities(splits.attacker_val) == identities(everything.val)


def test_images_and_labels_stay_with_their_indices(target: DataSplits, everything: DataSplits) -> None:
    whole = {index: n for n, index in enumerate(everything.train.indices.tolist())}
    attacker = attack_splits(target, everything).attacker_train
    for n, index in enumerate(attacker.indices.tolist()):
        if index in whole:
            assert torch.equal(attacker.images[n], everything.train.images[whole[index]])
            assert attacker.labels[n] == everything.train.labels[whole[index]]


def test_attackers_of_all_runs_on_a_data_set_own_the_same_images(target: DataSplits, everything: DataSplits) -> None:
    one, other = (attack_splits(target, everything) for _ in range(2))
    assert torch.equal(one.attacker_train.indices, other.attacker_train.indices)
    assert torch.equal(one.attacker_val.indices, other.attacker_val.indices)


def test_a_smaller_attacker_owns_a_part_of_what_a_larger_one_owns(target: DataSplits, everything: DataSplits) -> None:
    small = attack_splits(target, everything, aux_size=100)
    large = attack_splits(target, everything)
    assert len(small.attacker_train) == 100
    assert identities(small.attacker_train) < identities(large.attacker_train)
    assert identities(small.attacker_val) == identities(large.attacker_val)


def test_sets_that_share_an_image_are_refused(target: DataSplits) -> None:
    with pytest.raises(ValueError, match=r"attacker_train and test share 359 images"):
        AttackSplits(target.train, target.test, target.val, target.test)


def test_images_of_two_files_are_different_images(target: DataSplits) -> None:
    images = target.test
    elsewhere = ImageSet(images.images, images.labels, images.indices, "another file")
    assert not identities(images) & identities(elsewhere)


@pytest.mark.parametrize("size", [0, 592])
def test_more_images_than_there_are_is_an_error(target: DataSplits, everything: DataSplits, size: int) -> None:
    with pytest.raises(UsageError, match=r"--aux-size must be in 1\.\.591 for this run"):
        attack_splits(target, everything, aux_size=size)


def test_a_target_that_leaves_next_to_nothing_is_an_error(everything: DataSplits) -> None:
    few = DataSplits(
        everything.train, everything.val.subset(range(9)), everything.test, everything.class_names, (0.0,), (1.0,)
    )
    with pytest.raises(UsageError, match="left 9 images for an attacker"):
        attack_splits(few, few)


def test_pick_is_always_the_same_and_in_no_order_of_the_file(target: DataSplits) -> None:
    one, other = pick(target.test, 50), pick(target.test, 50)
    assert torch.equal(one.indices, other.indices)
    assert len(set(one.indices.tolist())) == 50
    assert not torch.equal(one.indices, one.indices.sort().values)


def test_varied_takes_one_image_of_every_class_before_any_second(target: DataSplits) -> None:
    assert varied(target.test, 10).labels.tolist() == list(range(10))
    assert varied(target.test, 13).labels.bincount().max() == 2
    assert len(varied(target.test, 5).labels.unique()) == 5
