import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops import keep_top_k
from tests.examples import examples

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e38, -1e38, 3.4028234663852886e38, 65504.0)
ENTRIES = st.one_of(
    st.integers(-3, 3).map(float),  # many ties
    st.floats(-10, 10, width=16),
    st.floats(),
    st.sampled_from([*SPECIAL, 6e-8, -6e-8, 1e-45, -1e-45, 5e-324, 1e-40]),  # subnormal in one dtype or another
)


def bits(x):
    """Compare bit by bit: NaN equals itself, and 0 differs from -0, which tells a kept -0 from a dropped one."""
    return x.contiguous().view(INTEGERS[x.element_size()])


def reference(x, k, score=None):
    """The definition, row by row in plain Python: the first k by descending magnitude, NaN first, then by index.

    With scores the magnitudes are multiplied by them first.
    """
    rows = x.reshape(-1, x.shape[-1])
    result = torch.zeros_like(rows)
    for row, out in zip(rows, result, strict=True):
        values = (row.abs() if score is None else row.abs().to(wide(x, score)) * score.to(wide(x, score))).tolist()
        order = sorted(range(len(values)), key=lambda i: (0, 0, i) if math.isnan(values[i]) else (1, -values[i], i))
        for i in order[:k]:
            out[i] = row[i]
    return result.view(x.shape)


@st.composite
def inputs(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = (*draw(st.sampled_from([(), (1,), (3,), (2, 2)])), draw(st.integers(1, 41)))
    count = math.prod(shape)
    if draw(st.booleans()):
        values = draw(st.lists(ENTRIES, min_size=count, max_size=count))
    else:  # hypothesis seldom draws long lists of unlike numbers by itself
        values = torch.randn(count, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))).tolist()
    return torch.tensor(values, dtype=torch.float64).to(dtype).view(shape), draw(st.integers(0, shape[-1]))


@settings(max_examples=examples(300))
@given(inputs())
def test_equals_the_definition(example):
    x, k = example
    assert torch.equal(bits(keep_top_k(x, k)), bits(reference(x, k)))


def wide(x, score):
    return torch.float64 if torch.float64 in (x.dtype, score.dtype) else torch.float32


@st.composite
def scored_inputs(draw):
    x, k = draw(inputs())
    scores = st.one_of(st.integers(0, 3).map(float), st.floats(0, 100, width=16), st.sampled_from([1e-30, 6e4]))
    values = draw(st.lists(scores, min_size=x.shape[-1], max_size=x.shape[-1]))
    return x, k, torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from([x.dtype, *DTYPES])))


@settings(max_examples=examples(300))
@given(scored_inputs())
def test_equals_the_definition_with_scores(example):
    x, k, score = example
    if not score.isfinite().all():  # 6e4 is too large for no dtype, but stay on the safe side
        return
    assert torch.equal(bits(keep_top_k(x, k, score)), bits(reference(x, k, score)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_decide_in_float32_or_wider(dtype):
    # Rounded to bfloat16 or float16 the products would tie, and the lowest index would win.
    x = torch.ones(2, dtype=dtype)
    score = torch.tensor([1.0, 1.0 + 2**-20])
    assert keep_top_k(x, 1, score).tolist() == [0.0, 1.0]


def test_infinity_times_a_score_of_zero_is_nan_and_kept():
    x = torch.tensor([1.0, -math.inf, 2.0])
    assert keep_top_k(x, 1, torch.tensor([1.0, 0.0, 1.0])).tolist() == [0.0, -math.inf, 0.0]


@settings(max_examples=examples(100))
@given(inputs())
def test_leaves_its_input_alone(example):
    x, k = example
    before = x.clone()
    keep_top_k(x, k)
    assert torch.equal(bits(x), bits(before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition_on_wide_rows(dtype):
    # Coarse values, so that the threshold is tied many times over.
    x = (torch.randn(3, 1031, generator=torch.Generator().manual_seed(0)) * 4).round().to(dtype)
    for k in (1, 500, 1030):
        assert torch.equal(bits(keep_top_k(x, k)), bits(reference(x, k)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 7, 32, 33])
def test_keeps_exactly_k_of_an_all_zero_row(dtype, k):
    # A kept -0 stays -0, a dropped one becomes +0, so the signs tell how many were kept, and which.
    kept = keep_top_k(torch.full((2, 33), -0.0, dtype=dtype), k).signbit()
    assert kept.tolist() == [[True] * k + [False] * (33 - k)] * 2


@pytest.mark.parametrize("value", [1.0, 1e38, torch.finfo(torch.float32).max, 1e-45, math.inf, math.nan])
def test_ties_go_to_the_lowest_index(value):
    x = torch.full((10,), value)
    x[::2] *= -1
    kept = keep_top_k(x, 4) != 0
    assert kept.tolist() == [True] * 4 + [False] * 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_larger_than_infinity(dtype, sign):
    x = torch.tensor([math.inf, 1.0, sign * math.nan, -math.inf], dtype=dtype)
    assert keep_top_k(x, 1).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(("dtype", "patterns"), [(torch.bfloat16, (0x7F81, 0x7FFF)), (torch.float16, (0x7C01, 0x7FFF))])
def test_all_bit_patterns_of_nan_tie(dtype, patterns):
    x = torch.tensor([0x3C00, *patterns, *patterns], dtype=torch.int16).view(dtype)
    assert keep_top_k(x, 1).isnan().tolist() == [False, True, False, False, False]


def test_infinity_times_zero_ties_with_nan():
    x = torch.tensor([0.0, math.inf, math.nan], dtype=torch.bfloat16)
    assert keep_top_k(x, 1, torch.zeros(3, dtype=torch.bfloat16)).tolist() == [0.0, math.inf, 0.0]


@pytest.mark.parametrize("k", [-1, 9, 100])
def test_refuses_a_count_outside_the_row(k):
    with pytest.raises(ValueError, match=f"cannot keep {k} of 8"):
        keep_top_k(torch.ones(2, 8), k)


def test_all_or_nothing():
    x = torch.randn(4, 9)
    assert torch.equal(keep_top_k(x, 9), x)
    assert torch.equal(keep_top_k(x, 0), torch.zeros(4, 9))


def test_any_memory_layout():
    base = torch.randn(6, 10, 14)
    for x in (base.transpose(1, 2), base[..., ::2], base[:, 3:7], base[:, :1].expand(6, 5, 14), base.flip(-1)):
        assert torch.equal(bits(keep_top_k(x, 3)), bits(reference(x, 3)))


def test_no_rows():
    assert keep_top_k(torch.empty(0, 8), 3).shape == (0, 8)


def test_rows_do_not_depend_on_their_batch():
    x = torch.randn(5, 7, 33)
    rows = torch.stack([torch.stack([keep_top_k(row, 11) for row in rows]) for rows in x])
    assert torch.equal(keep_top_k(x, 11), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype):
    x = torch.randn(64, 4099, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].round()
    x[2] = 0
    x[3, ::7] = math.nan
    x[4, ::5] = -math.inf
    x = x.to(dtype)
    for k in (0, 1, 2048, 4098, 4099):
        assert torch.equal(bits(keep_top_k(x.cuda(), k).cpu()), bits(keep_top_k(x, k)))
