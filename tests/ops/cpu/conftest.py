from collections.abc import Iterator

import pytest
import torch

from larosa.ops.cpu import library


@pytest.fixture(autouse=True, scope="module")
def poisoned_results() -> Iterator[None]:
    """Memory that PyTorch allocates is filled with NaN, so that an entry nobody wrote does not pass for a result."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    isa, threads = library.isa(), torch.get_num_threads()
    yield
    library.set_isa(isa)
    torch.set_num_threads(threads)
    library.share_threads(library.load(), True)
