"""What a machine cannot give is one line with the options that ask for less."""

import pytest
import torch

from cem.errors import MachineError
from cem.machine import enough


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: torch.empty(2**50), "out of memory: training wanted 4,503,599.6 GB at once; lower --batch-size"),
        (lambda: torch.empty(2**40, 2**40), "training wanted more than there is at once"),
        (lambda: torch.empty(10**30), "training wanted more than there is at once"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 57.00 GiB. GPU 0 has"), "wanted 57.00 GiB at"),
        (MemoryError("Unable to allocate 1.5 TiB for an array"), "wanted 1.5 TiB at once"),
        (
            RuntimeError("DataLoader worker (pid 42) is killed by signal: Killed. "),
            r"gone .*pid 42.*lower --num-workers",
        ),
    ],
)
def test_memory_that_ran_out_and_processes_that_were_killed_say_what_to_turn(ask, message):
    with pytest.raises(MachineError, match=message), enough("training", "--batch-size"):
        fail(ask) if isinstance(ask, Exception) else ask()


def test_other_errors_pass_also_those_that_a_worker_hands_on():
    with pytest.raises(RuntimeError, match="Caught KeyError"), enough("training", "--batch-size"):
        raise RuntimeError("Caught KeyError in DataLoader worker process 0.")
