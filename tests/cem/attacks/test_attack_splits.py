"""Which images whom: nobody is judged on what they have seen."""

from itertools import combinations

import pytest
import torch

from cem.attacks.splits import AttackSplits, attack_splits, identities, pick, varied
from cem.data import DataSplits, load_data
from cem.errors import UsageError


@pytest.fixture(scope="module")
def everything():
    return load_data("digits")


@pytest.fixture(scope="module")
def target():
    return load_data("digits", train_size=700)


@pytest.mark.parametrize("knowledge", ["auxiliary", "training"])
def test_every_image_is_in_one_of_the_sets_and_no_set_shares_one_with_another(target, everything, knowledge):
    splits = attack_splits(target, everything, knowledge=knowledge, trained_size=100)
    for one, other in combinations(vars(splits).values(), 2):
        assert not identities(one) & identities(other)
    assert sum(splits.sizes().values()) == 1797
    assert identities(splits.test) == identities(target.test)


def test_an_attacker_with_auxiliary_images_has_what_the_target_left_and_intercepts_what_it_was_trained_on(
    target, everything
):
    splits = attack_splits(target, everything, trained_size=100)
    sizes = {"attacker_train": 591, "attacker_val": 147, "test": 359, "trained": 100, "intercepted": 600}
    assert splits.sizes() == sizes
    assert identities(splits.trained) | identities(splits.intercepted) == identities(target.train)
    all_used = attack_splits(everything, everything)
    assert identities(all_used.attacker_train) | identities(all_used.attacker_val) == identities(everything.val)


def test_an_attacker_with_training_images_has_the_targets_and_is_not_scored_on_such(target, everything):
    splits = attack_splits(target, everything, knowledge="training", trained_size=100)
    sizes = {"attacker_train": 700, "attacker_val": 147, "test": 359, "trained": 0, "intercepted": 591}
    assert splits.sizes() == sizes
    assert identities(splits.attacker_train) == identities(target.train)
    assert not identities(splits.attacker_val) & identities(target.train)


def test_images_and_labels_stay_with_their_indices(target, everything):
    sets = (everything.train, everything.val)
    known = {index: (each, n) for each in sets for n, index in enumerate(each.indices.tolist())}
    attacker = attack_splits(target, everything).attacker_train
    for n, index in enumerate(attacker.indices.tolist()):
        source, position = known[index]
        assert torch.equal(attacker.images[n], source.images[position])
        assert attacker.labels[n] == source.labels[position]


def test_a_smaller_attacker_owns_a_part_of_what_a_larger_one_owns(target, everything):
    small = attack_splits(target, everything, aux_size=100)
    large, again = (attack_splits(target, everything) for _ in range(2))
    assert len(small.attacker_train) == 100
    assert identities(small.attacker_train) < identities(large.attacker_train)
    assert identities(small.attacker_val) == identities(large.attacker_val)
    assert torch.equal(large.attacker_train.indices, again.attacker_train.indices)


def test_sets_that_share_an_image_are_refused(target):
    with pytest.raises(ValueError, match=r"attacker_val and intercepted share \d+ images"):
        AttackSplits(target.train, target.val, target.test, target.test, target.val)


def test_an_attacker_without_enough_images_is_an_error(target, everything):
    for size in (0, 592):
        with pytest.raises(UsageError, match=r"--aux-size must be in 1\.\.591 for this run"):
            attack_splits(target, everything, aux_size=size)
    nine = everything.val.subset(range(9))
    few = DataSplits(everything.train, nine, everything.test, everything.class_names, (0.0,), (1.0,))
    with pytest.raises(UsageError, match="left 9 images for an attacker"):
        attack_splits(few, few)


def test_picked_images_are_always_the_same_in_no_order_of_the_file_and_varied_ones_of_all_classes(target):
    one, other = pick(target.test, 50), pick(target.test, 50)
    assert torch.equal(one.indices, other.indices)
    assert len(set(one.indices.tolist())) == 50
    assert not torch.equal(one.indices, one.indices.sort().values)
    assert varied(target.test, 10).labels.tolist() == list(range(10))
    assert varied(target.test, 13).labels.bincount().max() == 2
