import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from larosa.ops import drop_up_to


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=20), st.floats(0, 4, width=16))
def test_keeps_what_is_above(dtype, numbers, threshold):
    x = torch.tensor(numbers, dtype=dtype)
    threshold = float(torch.tensor(threshold, dtype=dtype))
    found = drop_up_to(x, threshold)
    assert found.dtype == dtype
    assert found.tolist() == [v if abs(v) > threshold else 0.0 for v in x.tolist()]


def test_an_entry_at_the_threshold_is_dropped():
    assert drop_up_to(torch.tensor([0.5, -0.5, 0.75]), 0.5).tolist() == [0, 0, 0.75]


def test_nan_survives():
    found = drop_up_to(torch.tensor([float("nan"), 1.0, float("inf")]), 2.0)
    assert found.isnan().tolist() == [True, False, False]
    assert found[2] == float("inf")


def test_zero_drops_nothing():
    x = torch.tensor([0.0, 1e-300, -3.0], dtype=torch.float64)
    assert torch.equal(drop_up_to(x, 0.0), x)
