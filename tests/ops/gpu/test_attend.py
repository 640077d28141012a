"""`attend` against float64."""

import pytest
import torch

from larosa.errors import LarosaError
from larosa.ops.attend import attend_reference

from .cases import DTYPES, doubled, entries, seeded


def check(target, dtype, query_heads, key_heads, size, length, position, *, window=0, rotated=True, gained=False):
    qkv = entries("normal", 1, (query_heads + 2 * key_heads) * size, seed=0)
    keys, values = (entries("normal", key_heads, length, size, seed=seed).to(dtype) for seed in (1, 2))
    for cache in (keys, values):
        cache[:, position:] = torch.nan  # what stands beyond the position is not read
    tables = [entries("normal", length, size, seed=seed) if rotated else None for seed in (3, 4)]
    gains = [entries("normal", size, seed=seed).to(dtype) if gained else None for seed in (5, 6)]
    before = keys.clone(), values.clone()
    at = torch.tensor([position])
    result = target("attend", qkv, keys, values, at, *tables, *gains, 1e-6, size**-0.5, window)

    exact_keys, exact_values = (cache.double() for cache in before)
    doubles = [doubled(tensor) for tensor in (*tables, *gains)]
    attend_reference(qkv.double(), exact_keys, exact_values, at, *doubles, 1e-6, size**-0.5, window)
    rounding = torch.finfo(dtype).eps
    written = exact_values[:, position]
    if target.truncates:
        torch.testing.assert_close(values[:, position].double(), written, rtol=rounding, atol=0)
    else:
        assert torch.equal(values[:, position], written.to(dtype))
    torch.testing.assert_close(keys[:, position].double(), exact_keys[:, position], rtol=rounding, atol=1e-5)
    for cache, old in zip((keys, values), before, strict=True):
        others = torch.arange(length) != position
        assert torch.equal(bytes_of(cache[:, others]), bytes_of(old[:, others]))
    # The row just written is rounded: compare with what was written, by a reference that finds it there.
    exact = attend_reference(qkv.double(), keys.double(), values.double(), at, *doubles, 1e-6, size**-0.5, window)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * rounding
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


def bytes_of(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 31, 32, 299])
def test_positions(target, dtype, position):
    check(target, dtype, 4, 2, 16, 300, position)


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "size"),
    [(1, 1, 8), (2, 2, 64), (8, 1, 128), (7, 1, 64), (12, 1, 16), (6, 2, 80), (1, 1, 128)],
)
def test_heads(target, query_heads, key_heads, size):
    for position in (5, 63):
        check(target, torch.float16, query_heads, key_heads, size, 64, position, gained=True)


@pytest.mark.parametrize("window", [1, 5, 40, 300, 1000])
def test_windows(target, window):
    for position in (0, 39, 299):
        check(target, torch.float32, 2, 1, 16, 300, position, window=window)


@pytest.mark.parametrize(("query_heads", "key_heads"), [(1, 1), (4, 2), (3, 1)])
def test_more_positions_than_are_copied_ahead(target, query_heads, key_heads):
    for position, window in ((399, 0), (399, 333), (130, 0)):
        check(target, torch.float32, query_heads, key_heads, 128, 400, position, window=window)
    check(target, torch.bfloat16, query_heads, key_heads, 256, 700, 699)


def test_without_rotation(target):
    check(target, torch.bfloat16, 4, 2, 16, 40, 20, rotated=False)
    check(target, torch.bfloat16, 4, 2, 16, 40, 20, rotated=False, gained=True)


def test_a_cache_of_one_position(target):
    check(target, torch.float32, 2, 1, 16, 1, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_give_what_softmax_gives(target, bad):
    for position in (0, 5, 200):
        qkv = torch.ones(1, 3 * 8)
        keys, values = torch.ones(1, 300, 8), entries("normal", 1, 300, 8, seed=0)
        keys[0, min(position, 3), 2] = bad
        at = torch.tensor([position])
        expected = attend_reference(qkv.double(), keys.double(), values.double(), at, *[None] * 4, 0.0, 1.0, 0)
        result = target("attend", qkv, keys, values, at, *[None] * 4, 0.0, 1.0, 0)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("position", [-1, 4, 2**40])
def test_a_position_outside_the_cache_gives_nan_and_writes_nothing(target, position):
    keys, values = torch.zeros(2, 1, 4, 8)
    result = target("attend", torch.ones(1, 24), keys, values, torch.tensor([position]), *[None] * 4, 0.0, 1.0, 0)
    assert result.isnan().all()
    assert not keys.any()
    assert not values.any()


def test_heads_that_are_not_whole_pieces(emulator):
    from larosa.ops.cuda import kernels

    keys, values = torch.zeros(2, 1, 4, 6)
    with pytest.raises(LarosaError, match="16 to 512 bytes in steps of 16, not of 6 float32 entries: set LAROSA_CUDA"):
        kernels.attend(torch.ones(1, 18), keys, values, torch.tensor([0]), *[None] * 4, 0.0, 1.0, 0)


def check_digits(target, query_heads, key_heads, size, length, position, *, window=0, rotated=False, gained=False):
    qkv = entries("normal", 1, (query_heads + 2 * key_heads) * size, seed=0)
    keys, values = torch.randint(-127, 128, (2, key_heads, length, size), dtype=torch.int8, generator=seeded(1))
    scales = (entries("normal", key_heads, length, 2, seed=2).abs() / 50).bfloat16()
    scales[:, position:] = torch.nan  # what stands beyond the position is not read
    tables = [entries("normal", length, size, seed=seed) if rotated else None for seed in (3, 4)]
    gains = [entries("normal", size, seed=seed) if gained else None for seed in (5, 6)]
    at, numbers = torch.tensor([position]), (1e-6, size**-0.5, window)
    before, exact = [[x.clone() for x in (keys, values, scales)] for _ in range(2)]
    result = target("attend", qkv, keys, values, at, *tables, *gains, *numbers, scales)

    doubles = [doubled(tensor) for tensor in (*tables, *gains)]
    expected = attend_reference(qkv.double(), *exact[:2], at, *doubles, *numbers, exact[2])
    torch.testing.assert_close(scales[:, position], exact[2][:, position], rtol=2**-7, atol=0)
    for cache, new in zip((keys, values), exact, strict=False):
        assert (cache[:, position].int() - new[:, position].int()).abs().max() <= 1
    others = torch.arange(length) != position
    for cache, old in zip((keys, values, scales), before, strict=True):
        assert torch.equal(bytes_of(cache[:, others]), bytes_of(old[:, others]))
    if rotated or gained:
        torch.testing.assert_close(result.double(), expected, rtol=0.03, atol=0.03)  # a digit may be another one
        return
    # As if the digits that were written had been given, and are numbers.
    wide = [cache.double() * scales[..., which, None].double() for which, cache in enumerate((keys, values))]
    written = [qkv[0, : query_heads * size].double(), *(cache[:, position].flatten() for cache in wide)]
    exact_result = attend_reference(torch.cat(written)[None], *wide, at, *doubles, *numbers)
    a_digit = scales[:, : position + 1].max().item()
    torch.testing.assert_close(result.double(), exact_result, rtol=1e-4, atol=0.02 * a_digit)


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "size"),
    [(1, 1, 128), (4, 2, 64), (7, 1, 16), (8, 8, 128), (6, 2, 80), (8, 2, 512), (16, 4, 128)],
)
@pytest.mark.parametrize("position", [0, 5, 63, 299])
def test_digits(target, query_heads, key_heads, size, position):
    check_digits(target, query_heads, key_heads, size, 300, position)


def test_digits_of_normed_and_rotated_keys(target):
    for gained in (False, True):
        check_digits(target, 4, 2, 64, 300, 200, rotated=True, gained=gained)


@pytest.mark.parametrize("window", [1, 40, 300])
def test_digits_in_windows(target, window):
    for position in (0, 39, 299):
        check_digits(target, 2, 1, 16, 300, position, window=window)


@pytest.mark.slow_in_triton
def test_more_digits_than_are_copied_ahead(target):
    check_digits(target, 2, 1, 128, 1500, 1499)
    check_digits(target, 4, 2, 128, 1500, 1300)


@pytest.mark.parametrize("kind", ["zero", "tied", "huge", "special"])
def test_digits_of_any_kind(target, kind):
    """What is not finite has digits of 0 and a scale that is not finite: the results of heads that read it are NaN."""
    qkv = entries(kind, 1, 12 * 32, seed=0)
    keys, values = torch.ones(2, 4, 8, 32, dtype=torch.int8)
    scales = torch.ones(4, 8, 2, dtype=torch.bfloat16)
    exact = [x.clone() for x in (keys, values, scales)]
    rest = torch.tensor([3]), None, None, None, None, 0.0, 32**-0.5, 0
    result = target("attend", qkv, keys, values, *rest, scales)
    expected = attend_reference(qkv, *exact[:2], *rest, exact[2])
    torch.testing.assert_close(scales, exact[2], rtol=2**-7, atol=0, equal_nan=True)
    for cache, new in zip((keys, values), exact, strict=False):
        assert (cache.int() - new.int()).abs().max() <= 1
    finite = qkv.view(3, 4, 32).isfinite().all(dim=-1).all(dim=0)
    assert result.view(4, 32)[~finite].isnan().all()
    assert result[expected.isfinite()].isfinite().all()
