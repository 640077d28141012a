"""What holds for the operators of every device."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def poisoned_results() -> Iterator[None]:
    """Memory that PyTorch allocates is filled with NaN, so that an entry nobody wrote does not pass for a result."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
