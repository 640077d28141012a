"""`attend` against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops.attend import attend_reference
from tests.examples import examples

from .cases import DTYPES, chances, doubled

ops = torch.ops.larosa


@st.composite
def problems(draw):
    chance = draw(chances("normal"))
    key_heads, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([2, 8, 10, 16, 22, 64, 80]))
    capacity = draw(st.one_of(st.integers(1, 20), st.sampled_from([127, 128, 129, 300])))
    dtype = draw(st.sampled_from(DTYPES))
    qkv = chance.tensor(1, (shared + 2) * key_heads * size)
    cache = [chance.tensor(key_heads, capacity, size, dtype=dtype) for _ in range(2)]
    rotary = [chance.tensor(capacity, size) for _ in range(2)] if draw(st.booleans()) else [None, None]
    gains = [chance.maybe(size, dtype=draw(st.sampled_from(DTYPES))) for _ in range(2)]
    position = draw(st.one_of(st.just(capacity - 1), st.integers(0, capacity - 1)))
    window = draw(st.sampled_from([0, 0, 1, 5, capacity, 1000]))
    return chance, qkv, cache, position, rotary, gains, window


@settings(max_examples=examples(600))
@given(problems())
def test_is_the_reference(problem):
    chance, qkv, (keys, values), position, rotary, gains, window = problem
    scale = keys.shape[2] ** -0.5
    before = keys.clone(), values.clone()
    result = chance.run(ops.attend, qkv, keys, values, torch.tensor([position]), *rotary, *gains, 1e-6, scale, window)
    exact_keys, exact_values = (cache.double() for cache in before)
    exact = attend_reference(
        qkv.double(),
        exact_keys,
        exact_values,
        torch.tensor([position]),
        *(doubled(table) for table in rotary),
        *(doubled(gain) for gain in gains),
        1e-6,
        scale,
        window,
    )
    if keys.dtype == torch.float32:
        torch.testing.assert_close(keys.double(), exact_keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values.double(), exact_values, rtol=0, atol=0)
    else:  # rounded to the nearest of two neighbours
        torch.testing.assert_close(keys.double(), exact_keys, rtol=2**-8, atol=1e-5)
        assert torch.equal(values, exact_values.to(keys.dtype))
    for cache, old in zip((keys, values), before, strict=True):
        others = torch.arange(keys.shape[1]) != position
        assert torch.equal(cache[:, others], old[:, others])
    if keys.dtype == torch.float32:
        tolerance = 2e-4
    else:  # the row just written is rounded in the one and not in the other: compare with what was written
        exact_keys, exact_values = keys.double(), values.double()
        tolerance = 3e-2
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


@settings(max_examples=examples(300))
@given(problems(), chances("normal", "integer", "special", "wild"))
def test_keys_and_values_of_8_bits_are_the_references(problem, chance):
    _, qkv, (floats, _), position, rotary, gains, window = problem
    qkv = chance.tensor(*qkv.shape)
    keys, values = torch.randint(-127, 128, (2, *floats.shape), dtype=torch.int8, generator=chance.generator)
    scales = torch.rand(*floats.shape[:2], 2, generator=chance.generator).bfloat16()
    before, exact = [[x.clone() for x in (keys, values, scales)] for _ in range(2)]
    rest = 1e-6, floats.shape[2] ** -0.5, window
    at = torch.tensor([position])
    result = chance.run(ops.attend, qkv, keys, values, at, *rotary, *gains, *rest, scales)

    doubles = [doubled(x) for x in (*rotary, *gains)]
    attend_reference(qkv.double(), *exact[:2], at, *doubles, *rest, exact[2])
    torch.testing.assert_close(scales[:, position], exact[2][:, position], rtol=2**-7, atol=1e-38, equal_nan=True)
    for cache, new in zip((keys, values), exact, strict=False):
        assert (cache[:, position].int() - new[:, position].int()).abs().max() <= 1
    others = torch.arange(floats.shape[1]) != position
    for cache, old in zip((keys, values, scales), before, strict=True):
        assert torch.equal(cache[:, others], old[:, others])
    # The reference with the digits that were written, which it writes again: the largest of them is 127.
    if chance.kind != "normal" or rotary[0] is not None or gains[1] is not None:
        return
    heads = qkv.shape[1] // floats.shape[2] - 2 * len(floats)
    wide = [cache.double() * scales[..., which, None].double() for which, cache in enumerate((keys, values))]
    written = [qkv[0, : heads * floats.shape[2]].double(), *(cache[:, position].flatten() for cache in wide)]
    expected = attend_reference(torch.cat(written)[None], *wide, at, *doubles, *rest)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_row_just_written_is_read_as_it_was_rounded(dtype):
    """With one position the result is the value itself, as the cache has it."""
    qkv = torch.randn(1, 4 * 16)
    keys, values = torch.zeros(2, 1, 3, 16, dtype=dtype)
    result = ops.attend(qkv, keys, values, torch.tensor([2]), None, None, None, None, 0.0, 1.0, 1)
    assert torch.equal(result.view(2, 16), qkv[:, 48:].to(dtype).float().expand(2, 16))
    assert torch.equal(values[0, 2], qkv[0, 48:].to(dtype))


@settings(max_examples=examples(200))
@given(
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.lists(st.floats(width=32, allow_nan=True) | st.floats(-(2.0**-13), 2.0**-13, width=32), min_size=8, max_size=8),
)
def test_any_number_is_rounded_as_pytorch_rounds_it(dtype, numbers):
    qkv = torch.zeros(1, 3 * 8)
    qkv[0, 16:] = torch.tensor(numbers)
    keys, values = torch.zeros(2, 1, 1, 8, dtype=dtype)
    ops.attend(qkv, keys, values, torch.tensor([0]), None, None, None, None, 0.0, 1.0, 0)
    torch.testing.assert_close(values[0], qkv[:, 16:].to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_give_what_softmax_gives(bad):
    for position in (0, 5, 200):
        qkv = torch.ones(1, 3 * 8)
        keys, values = torch.ones(1, 300, 8), torch.randn(1, 300, 8)
        keys[0, min(position, 3), 2] = bad
        qkv[0, 0] = 1.0
        expected = attend_reference(
            qkv.double(), keys.double(), values.double(), torch.tensor([position]), *[None] * 4, 0.0, 1.0, 0
        )
        result = ops.attend(qkv, keys, values, torch.tensor([position]), *[None] * 4, 0.0, 1.0, 0)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_the_cache(position):
    keys, values = torch.zeros(2, 1, 4, 8)
    with pytest.raises(IndexError, match="position"):
        ops.attend(torch.zeros(1, 24), keys, values, torch.tensor([position]), *[None] * 4, 0.0, 1.0, 0)


@settings(max_examples=examples(300))
@given(problems(), st.data())
def test_rows_of_several_caches_are_the_reference(problem, data):
    """Each row is what it is alone, to the bit, once the rows before it in its cache have been stored."""
    chance, qkv, (floats, _), _, rotary, gains, window = problem
    heads, capacity, size = floats.shape
    caches, kind = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([floats.dtype, torch.int8]))
    places = [(cache, at) for cache in range(caches) for at in range(capacity)]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=8, unique=True))
    number, position = torch.tensor(chosen).T.contiguous()
    qkv = chance.tensor(len(chosen), qkv.shape[1])
    keys, values = ((30 * chance.tensor(caches, heads, capacity, size)).to(kind) for _ in range(2))
    scales = chance.tensor(caches, heads, capacity, 2).abs().bfloat16() if kind == torch.int8 else None
    rest = *rotary, *gains, 1e-6, size**-0.5, window
    stored = [None if x is None else x.clone() for x in (keys, values, scales)]
    found = chance.run(ops.attend, qkv, *stored[:2], position, *rest, stored[2], number)

    by_one = [None if x is None else x.clone() for x in (keys, values, scales)]
    for row in sorted(range(len(chosen)), key=lambda row: chosen[row]):
        mine = [None if x is None else x[chosen[row][0]] for x in by_one]
        alone = chance.run(ops.attend, qkv[row : row + 1], *mine[:2], position[row : row + 1], *rest, mine[2])
        assert torch.equal(found[row : row + 1], alone)
    for one, other in zip(stored, by_one, strict=True):
        assert one is None or torch.equal(one, other)

    # The reference stores them once more, over what the kernel has stored.
    exact = [x.clone() if kind == torch.int8 else x.double() for x in stored[:2]]
    doubles = [doubled(x) for x in (*rotary, *gains)]
    factors = None if stored[2] is None else stored[2].clone()
    expected = attend_reference(qkv.double(), *exact, position, *doubles, *rest[4:], factors, number)
    tolerance = 2e-4 if kind == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_what_rows_may_not_be():
    qkv, keys, values = torch.zeros(2, 24), *torch.zeros(2, 2, 1, 4, 8)
    at, rest = torch.tensor([1, 1]), (*[None] * 4, 0.0, 1.0, 0, None)
    with pytest.raises(IndexError, match="the same for two rows of one cache"):
        ops.attend(qkv, keys, values, at, *rest, torch.tensor([1, 1]))
    for number in (-1, 2):
        with pytest.raises(IndexError, match="not the number of one of the caches"):
            ops.attend(qkv, keys, values, at, *rest, torch.tensor([0, number]))
    ops.attend(qkv, keys, values, at, *rest, torch.tensor([0, 1]))
