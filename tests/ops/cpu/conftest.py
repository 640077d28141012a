from collections.abc import Iterator

import pytest
import torch

from larosa.ops.cpu import library


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    isa, threads = library.isa(), torch.get_num_threads()
    yield
    library.set_isa(isa)
    torch.set_num_threads(threads)
    library.share_threads(library.load(), True)
