"""GPUs of 8.x, such as a laptop's: no clusters of blocks, and 99 KB of shared memory for one. In the emulator."""

from dataclasses import replace

import pytest
import torch

from larosa.ops import column_major
from larosa.ops.cuda import kernels, launch
from larosa.ops.cuda.launch import Machine
from larosa.ops.greedy import greedy_reference
from larosa.ops.linear import sparse_linear_reference
from larosa.ops.low_bit import low_bit_linear_reference
from larosa.ops.low_bit_site import low_bit_site_reference
from larosa.ops.select import above_reference, top_k_reference
from larosa.ops.top_k_linear import rms_norm_top_k_swiglu_reference, top_k_linear_reference

from .cases import Target, entries
from .test_attend import check as check_attend
from .test_low_bit import FORMS, assert_near, drawn
from .test_products import check, digits

#: As SMALL_H200 has, few multiprocessors, for the sizes of the tests to fill them.
SMALL_RTX = Machine(capability=(8, 6), multiprocessors=8, shared_memory=99 * 1024)


@pytest.fixture
def small(emulator, monkeypatch) -> Target:
    monkeypatch.setattr(emulator, "gpu", SMALL_RTX)
    monkeypatch.setattr(launch, "launch", emulator.launch)
    monkeypatch.setattr(launch, "machine", emulator.machine)
    return Target(kernels, torch.device("cpu"))


def columns(outputs: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return column_major(entries("normal", outputs, width, seed=seed).to(dtype))


@pytest.mark.parametrize("outputs", [[256], [1024, 256, 256], [2300]])
@pytest.mark.parametrize(("width", "k"), [(4096, 2048), (700, 350), (8192, 8000), (11008, 5504)])
def test_products_that_select(small, outputs, width, k):
    weights = [columns(n, width, torch.float16, seed=i) for i, n in enumerate(outputs)]
    x, residual = entries("normal", 1, width, seed=5), entries("normal", 1, sum(outputs), seed=6)
    operands = (x, k, None, weights, [None] * len(weights), residual)
    result = small("top_k_linear", *operands)
    expected = top_k_linear_reference(x.double(), k, None, [w.double() for w in weights], *operands[4:])
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)


def test_gate_and_up(small):
    x, gain = entries("normal", 1, 2048, seed=0), entries("normal", 2048, seed=1)
    weights = [columns(2816, 2048, torch.bfloat16, seed=2 + i) / 45 for i in range(2)]
    operands = (gain, 1e-5, 1024, None, weights, [None, None])
    result = small("rms_norm_top_k_swiglu", x, *operands)
    doubles = [gain.double(), 1e-5, 1024, None, [w.double() for w in weights], [None, None]]
    torch.testing.assert_close(
        result.double(), rms_norm_top_k_swiglu_reference(x.double(), *doubles), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("stored", ["full", "int8"])
@pytest.mark.parametrize(("outputs", "width", "k"), [(512, 5504, 2752), (4096, 900, 1), (500, 16384, 16000)])
def test_a_product_with_an_adapter(small, stored, outputs, width, k):
    values, residual = entries("normal", 1, k, seed=0), entries("normal", 1, outputs, seed=1)
    indices = torch.arange(width - k, width, dtype=torch.int32)[None]
    weights = [columns(outputs, width, torch.float16, seed=2)]
    carrying = [residual, columns(outputs, outputs, torch.float16, seed=3), None]
    if stored == "int8":
        scale = entries("normal", outputs, seed=4).half()
        carrying[1:] = [digits(outputs, outputs + outputs // 16, seed=3), scale]
    result = small("sparse_linear", values, indices, weights, [None], *carrying)
    check(result, sparse_linear_reference, (values.double(), indices), weights, [None], *carrying)


@pytest.mark.parametrize("k", [12000, 3584, 0])
def test_a_long_product_with_an_adapter_that_selects(small, k):
    """Of an MLP as wide as Llama-3-8B's, whose list alone is larger than a block's memory."""
    x, residual = entries("normal", 1, 14336, seed=0), entries("normal", 1, 384, seed=1)
    values, indices = top_k_reference(x, k, None)
    weights, adapter = [columns(384, 14336, torch.float16, seed=2)], columns(384, 384, torch.float16, seed=3)
    board = torch.zeros(1, dtype=torch.int64)
    result = small("top_k_linear", x, k, None, weights, [None], residual, adapter, None, board)
    check(result, sparse_linear_reference, (values.double(), indices), weights, [None], residual, adapter, None)


@pytest.mark.parametrize(("outputs", "width"), [([1024, 256, 256], 4096), ([384], 14336), ([384], 11008)])
def test_products_that_compare(small, outputs, width):
    """Some blocks have room for all that may be above, of longer vectors none."""
    weights = [columns(n, width, torch.float16, seed=i) for i, n in enumerate(outputs)]
    x, residual = entries("normal", 1, width, seed=5), entries("normal", 1, sum(outputs), seed=6)
    values, indices, count = above_reference(x, 0.7)
    values, indices = values[:, : int(count)].double(), indices[:, : int(count)]
    biases = [None] * len(weights)
    result = small("above_linear", x, 0.7, None, weights, biases, residual)
    check(result, sparse_linear_reference, (values, indices), weights, biases, residual)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_codes(small, form):
    """A norm, gate and up are one after the other: no block has room for a list and the sums of two teams."""
    x = entries("normal", 1, 600, seed=1)
    given = drawn(form, [480, 480], 600, x, None)
    operands = *(None, 1e-5, None, None, None, True), *given.weights
    assert_near(small("low_bit_site", x, *operands), low_bit_site_reference(x.double(), *operands))
    residual, adapter, scale = entries("normal", 1, 90, seed=2), digits(512, 106, 4), entries("normal", 512, seed=5)
    given = replace(drawn(form, [512], 600, x, None), residual=residual, adapter=adapter, adapter_scale=scale)
    exact = low_bit_linear_reference(*given.each(torch.Tensor.double).arguments())
    assert_near(small("low_bit_linear", *given.arguments()), exact)


@pytest.mark.parametrize(("query_heads", "key_heads", "size"), [(8, 2, 128), (4, 4, 64), (16, 1, 256)])
def test_attention(small, query_heads, key_heads, size):
    check_attend(small, torch.float16, query_heads, key_heads, size, 600, 599)


def test_the_choice_of_a_token(small):
    logits = entries("normal", 2, 32000, seed=0)
    assert torch.equal(small("greedy", logits), greedy_reference(logits))
