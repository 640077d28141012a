"""Keys and values as they are stored, against loops in Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from larosa.formats import CacheDtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT8 = CacheDtype.INT8.beside(torch.float32)


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from(DTYPES), st.floats(-20, 20))
def test_every_number_is_a_whole_number_of_127ths(seed, size, dtype, power):
    x = (vectors(seed, 3, size) * 2**power).clamp(-60000, 60000).to(dtype)
    stored, scale = INT8.pack(x)
    assert (stored.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    for row, codes, by in zip(x.double().tolist(), stored.tolist(), scale.double().tolist(), strict=True):
        largest = torch.tensor(max(map(abs, row)), dtype=torch.float32)
        assert by == float((largest / 127).bfloat16())
        for wanted, code in zip(row, codes, strict=True):
            assert abs(code) <= 127
            assert abs(wanted - by * code) <= by * (0.5 + 1e-4) or abs(code) == 127  # a rounded scale may be too small
    assert torch.equal(INT8.unpack(stored, scale, torch.float64), stored.double() * scale.double()[:, None])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad):
    x = vectors(0, 2, 8)
    x[1, 3] = bad
    stored, scale = INT8.pack(x)
    assert scale.isfinite().tolist() == [True, False]
    assert not stored[1].any()
    assert not INT8.unpack(stored, scale, torch.float32)[1].isfinite().any()


def test_nothing_stays_nothing():
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-38]])
    assert INT8.unpack(*INT8.pack(x), torch.float32).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_models_own_dtype_keeps_them_as_they_are(dtype):
    form, x = CacheDtype.AUTO.beside(dtype), vectors(0, 4, 6).to(dtype)
    stored, scale = form.pack(x)
    assert scale is None
    assert torch.equal(stored, x)
    assert torch.equal(form.unpack(stored, scale, torch.float32), x.float())


@pytest.mark.parametrize("form", [INT8, *map(CacheDtype.AUTO.beside, DTYPES)])
def test_sizes(form):
    keys, values, scales = form.empty((2, 5, 8), torch.device("cpu"))
    for entries in (keys, values):
        assert entries.shape == (2, 5, 8)
        assert entries.dtype is form.dtype
    stored = keys.nbytes + values.nbytes + (0 if scales is None else scales.nbytes)
    assert stored == 2 * (2 * 5) * form.vector_bytes(8)
