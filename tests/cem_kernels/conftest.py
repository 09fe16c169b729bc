"""What the tests of kernels share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """A kernel that reads what nobody wrote finds NaN there: PyTorch's own aid against nondeterminism."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
