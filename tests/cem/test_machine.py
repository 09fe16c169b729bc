"""Memory that ran out and processes that are gone, in one line that says which options to turn."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cem.errors import MachineError
from cem.machine import check_fits, enough


class Killed(Dataset):
    """A process that reads from it ends as by the system, for want of memory."""

    def __len__(self):
        return 4

    def __getitem__(self, position):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: torch.zeros(10**15), "out of memory: the model wanted 4,000,000.0 GB at once; lower --batch-size"),
        (lambda: np.zeros(10**15), "out of memory: the model wanted 7.11 PiB at once; lower --batch-size"),
        (lambda: list(DataLoader(Killed(), num_workers=1)), "a process that loads images is gone … --num-workers"),
    ],
    ids=["torch", "numpy", "worker"],
)
def test_what_a_machine_does_not_give_is_said_with_the_options_to_turn(work, message):
    with (
        pytest.raises(MachineError, match=".*".join(map(re.escape, message.split(" … ")))),
        enough("the model", "--batch-size"),
    ):
        work()


def test_other_errors_are_bugs_and_stay_what_they_are():
    with pytest.raises(RuntimeError, match="size of tensor"), enough("the model", "--batch-size"):
        torch.zeros(2) + torch.zeros(3)


def test_what_is_larger_than_the_machine_is_refused_before_it_is_tried():
    check_fits(10**6, torch.device("cpu"), "the model", "--bottleneck")
    with pytest.raises(
        MachineError, match=r"the model takes at least 1,000,000\.0 GB of [\d.,]+ GB; lower --bottleneck$"
    ):
        check_fits(10**15, torch.device("cpu"), "the model", "--bottleneck")
