"""Adapters as they are stored, against loops in Python and what their definition says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from larosa.formats import AdapterFormat
from larosa.formats.adapters import HIGH, INT8_ADAPTERS, leading_entries
from larosa.ops.adapter import adapt_reference
from larosa.rotation import random_basis

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=examples(50))
@given(st.integers(1, 80), st.integers(0, 2**31), st.sampled_from(DTYPES), st.sampled_from(["random", "near", "signs"]))
def test_every_number_is_within_half_a_step(width, seed, dtype, kind):
    R = random_basis(width, seed)
    if kind == "near":  # neighbouring layers share their strongest directions
        R = torch.linalg.qr(torch.eye(width, dtype=torch.float64) + 0.05 * R).Q
    if kind == "signs":
        R = torch.diag(R.diagonal().sign())
    adapter = INT8_ADAPTERS.pack(R, dtype)
    leading = leading_entries(width)
    assert adapter.weight.dtype is torch.int8
    assert adapter.weight.shape == (width, width + leading)
    assert int(adapter.weight.int().abs().max()) <= 127
    scale = adapter.scale.double()
    assert adapter.scale.dtype is dtype
    assert torch.equal(scale, scale.log2().round().exp2()), "a power of two, the same in every dtype"
    assert ((INT8_ADAPTERS.unpack(adapter) - R).abs() <= scale / 2 + 1e-12).all()
    # No scale could be half as large: some digit would need more than eight bits.
    reach = torch.full((width, 1), 127.0, dtype=torch.float64)
    reach[:leading] *= HIGH
    smallest = (R.abs() / reach).amax(0)
    assert (scale < 2 * smallest.clamp_min(2.0**-14) * (1 + 1e-9)).all()


def test_the_matrix_is_digit_by_digit_that_of_the_definition():
    adapter = INT8_ADAPTERS.pack(random_basis(40, 3), torch.float32)
    R = torch.zeros(40, 40, dtype=torch.float64)
    for i in range(40):
        for j in range(40):
            digits = int(adapter.weight[j, i])
            if i < adapter.weight.shape[1] - 40:
                digits += 128 * int(adapter.weight[j, 40 + i])
            R[i, j] = digits * float(adapter.scale[j])
    assert torch.equal(INT8_ADAPTERS.unpack(adapter), R)
    torch.testing.assert_close(adapt_reference(torch.eye(40).double(), adapter.weight, adapter.scale), R)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stream_as_large_as_its_format_allows_does_not_overflow(dtype):
    adapter = INT8_ADAPTERS.pack(random_basis(256, 1), dtype)
    x = torch.zeros(1, 256, dtype=dtype)
    x[0, 3] = x[0, 100] = torch.finfo(dtype).max / 2
    found = adapt_reference(x, adapter.weight, adapter.scale)
    expected = adapt_reference(x.double(), adapter.weight, adapter.scale)
    assert found.isfinite().all()
    assert float((found.double() - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_full_adapter_is_rounded_once(dtype):
    R = random_basis(24, 5)
    assert torch.equal(AdapterFormat.FULL.storage.pack(R, dtype).weight, R.T.to(dtype))


@pytest.mark.parametrize("form", AdapterFormat)
@pytest.mark.parametrize("width", [1, 15, 40, 300])
def test_sizes_and_the_parts_of_ranks(form, width):
    adapter = form.storage.pack(random_basis(width, 0), torch.bfloat16)
    assert adapter.weight.shape == (width, form.storage.columns(width))
    stored = adapter.weight.nbytes + (0 if adapter.scale is None else adapter.scale.nbytes)
    assert form.storage.stored_bytes(width, torch.bfloat16.itemsize) == stored
    # Ranks' products of their own entries of x add up to the whole one.
    x = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(width, dtype=torch.float64)
    for inputs in (slice(0, width // 3), slice(width // 3, width)):
        own = torch.cat([adapter.weight[:, part] for part in form.storage.parts(inputs, width)], dim=1)
        mine = x[inputs]
        total += own.double() @ mine if adapter.scale is None else adapt_reference(mine, own, adapter.scale)
    torch.testing.assert_close(total, x @ form.storage.unpack(adapter))
