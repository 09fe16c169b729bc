"""Several processes measure their batches as one process would; of two in the first tier, of four as well."""

from functools import partial

import pytest
import torch
from processes import CASES, CLASSES, alone, build, injected, of_processes, trained

import cem


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"])
def found(request, tmp_path_factory):
    """What every process found, with gloo."""
    return of_processes(request.param, tmp_path_factory.mktemp("processes"))


def assert_equal(found, want, tolerance=1e-12):
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("case", CASES)
def test_a_training_ends_as_that_of_one_process_with_the_whole_batch(case, found):
    want = trained(partial(build, case), 0, 1)
    assert case == "none" or any(name.startswith("surrogate.") for name in want)
    for state in found:
        assert_equal(state[case], want)


def test_what_a_term_remembers_is_the_same_in_all_processes_to_the_bit(found):
    for case in CASES:
        for state in found:
            assert_equal(state[case], found[0][case], 0)


def test_an_adversary_sees_the_images_of_all_and_a_split_step_gets_its_gradient(found):
    want = injected(0, 1)
    assert want["gradient"].norm() > 0
    for each in found:
        assert_equal(each["injected"], want)


def test_where_one_process_cannot_take_part_the_others_end_too(found):
    (first, other), (own, same) = found[0]["refused"], found[1]["refused"]
    assert own == "TypeError: labels must be an integer tensor, got torch.float32"
    assert first == "ValueError: process 1 of the group cannot take part, and says why itself"
    for text in (other, same):
        assert text.startswith(
            "ValueError: processes of a group must have samples of one kind, got 6 samples of features"
        )
        assert "features [B, 16] float32" in text
        assert "features [B, 17] float32" in text


def test_one_process_may_evaluate_by_itself(found):
    assert_equal(found[0]["alone"], alone(0, 1))


def test_a_process_group_restricts_who_measures_together(found):
    want = trained(partial(cem.CentroidCEM, 16, CLASSES, 0.3), 0, 1)
    for each in found:
        if "pairs" in each:  # of four
            assert_equal(each["pairs"], want)
    assert len(found) == 2 or all("pairs" in each for each in found)


def test_without_a_group_the_batch_is_the_process_s_own():
    features = torch.zeros(4, 16)
    batch = cem.Batch(None, torch.zeros(4, dtype=torch.int32), features, features)
    with cem.CentroidCEM(16, CLASSES, 0.3).together(batch) as whole:
        assert whole is batch
