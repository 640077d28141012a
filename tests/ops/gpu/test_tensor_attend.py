"""`attend` for query heads that share keys of 16 bits, by CUDA's two kernels: more exact than that format."""

import pytest
import torch

from larosa.ops.attend import attend_reference
from larosa.ops.cuda import kernels

from .cases import entries

pytestmark = pytest.mark.usefixtures("attention")


@pytest.fixture(autouse=True)
def needs_cuda_kernels(target):
    if target.kernels is not kernels:
        pytest.skip("CUDA's")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("query_heads", "key_heads", "size"),
    [(2, 1, 16), (3, 1, 48), (4, 2, 32), (4, 1, 128), (7, 1, 64), (8, 1, 80), (9, 1, 16), (22, 2, 16), (4, 2, 256)],
)
def test_queries_and_weights_keep_more_bits_than_the_cache(target, dtype, query_heads, key_heads, size):
    tolerance = 1e-5 if dtype == torch.float16 else 5e-5
    for position, window in ((0, 0), (79, 0), (298, 0), (299, 200)):
        compare(target, dtype, query_heads, key_heads, size, 300, position, window=window, tolerance=tolerance)


def compare(
    target, dtype, query_heads, key_heads, size, length, position, *, tolerance, window=0, queries=1.0, scale=None
):
    """All but the queries is in the cache's format, so that nothing need be rounded."""
    q = queries * entries("normal", 1, query_heads * size, seed=0)
    kv = entries("normal", 1, 2 * key_heads * size, seed=3).to(dtype).float()
    qkv, at = torch.cat([q, kv], dim=1), torch.tensor([position])
    keys, values = (entries("normal", key_heads, length, size, seed=seed).to(dtype) for seed in (1, 2))
    exact = keys.double(), values.double()
    for cache in (keys, values):
        cache[:, position:] = torch.nan
        if window:
            cache[:, : max(0, position + 1 - window)] = torch.nan
    rest = *[None] * 4, 0.0, scale or size**-0.5, window
    result = target("attend", qkv, keys, values, at, *rest)
    expected = attend_reference(qkv.double(), *exact, at, *rest)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("position", [14, 15, 16, 17, 62, 63, 64, 65, 126, 127, 128, 255, 256, 511, 512, 513, 1100])
def test_positions_about_the_steps_of_warps_and_blocks(target, position):
    compare(target, torch.float16, 4, 1, 16, 1200, position, tolerance=1e-5)
    compare(target, torch.bfloat16, 4, 1, 64, 1200, position, tolerance=5e-5, window=77)


@pytest.mark.parametrize(
    ("dtype", "size", "length"),
    [(torch.float16, 16, 5000), (torch.bfloat16, 80, 4000), (torch.bfloat16, 128, 3000), (torch.float16, 256, 1600)],
)
def test_more_positions_than_are_copied_ahead(target, dtype, size, length):
    tolerance = 1e-5 if dtype == torch.float16 else 5e-5
    compare(target, dtype, 3, 1, size, length, length - 1, tolerance=tolerance)
    compare(target, dtype, 3, 1, size, length, length - 7, tolerance=tolerance, window=length - 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [1e-30, 1e-5, 1e5, 1e30])
def test_huge_and_tiny_queries(target, dtype, queries):
    """Which float16 does not hold."""
    compare(target, dtype, 4, 1, 32, 100, 99, queries=queries, scale=0.2 / queries, tolerance=5e-5)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 2.0**100)])
def test_huge_keys_and_values(target, dtype, largest):
    qkv = entries("normal", 1, 4 * 16 + 2 * 16, seed=0).to(dtype).float()
    keys, values = (entries("normal", 1, 100, 16, seed=seed).to(dtype) for seed in (1, 2))
    keys[0, 3], values[0, 5] = largest, -largest
    at, rest = torch.tensor([99]), (*[None] * 4, 0.0, 1 / largest, 0)
    expected = attend_reference(qkv.double(), keys.double(), values.double(), at, *rest)
    result = target("attend", qkv, keys, values, at, *rest)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_in_a_group_of_heads(target, dtype, bad, where):
    """It spoils the heads that meet it, and no others; a score of -infinity has no weight."""
    qkv = torch.ones(1, 6 * 16 + 4 * 16)
    qkv[0, : 6 * 16] += torch.arange(6 * 16) / 100  # parts of them have either sign
    keys, values = torch.ones(2, 100, 16).to(dtype), entries("normal", 2, 100, 16, seed=0).to(dtype)
    if where == "query":
        qkv[0, 16 + 3] = bad
    else:
        (keys if where == "key" else values)[1, 7, 2] = bad
    for position in (99, 7):  # where it is written over at last
        at, rest = torch.tensor([position]), (*[None] * 4, 0.0, 1.0, 0)
        expected = attend_reference(qkv.double(), keys.double(), values.double(), at, *rest)
        result = target("attend", qkv, keys, values, at, *rest)
        expected, result = expected.nan_to_num(torch.nan, posinf=torch.nan, neginf=torch.nan), result.double()
        result = result.nan_to_num(torch.nan, posinf=torch.nan, neginf=torch.nan)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("position", [-1, 40, 2**40])
def test_a_position_outside_the_cache_of_a_group_gives_nan_and_writes_nothing(target, position):
    keys, values = torch.zeros(2, 1, 40, 16, dtype=torch.float16)
    result = target("attend", torch.ones(1, 96), keys, values, torch.tensor([position]), *[None] * 4, 0.0, 1.0, 0)
    assert result.isnan().all()
    assert not keys.any()
    assert not values.any()
