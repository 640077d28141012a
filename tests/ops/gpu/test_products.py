"""`linear` and `sparse_linear` against float64, on every layout that weights may have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops import column_major
from larosa.ops.linear import linear_reference, sparse_linear_reference
from tests.examples import examples

from .cases import DTYPES, doubled, entries, seeded

EPS = torch.finfo(torch.float32).eps
#: With outputs that are whole pieces of 16 bytes, and that are not.
OUTPUTS = st.lists(st.integers(1, 24).map(lambda n: 8 * n) | st.integers(1, 150), min_size=1, max_size=4)


@st.composite
def problems(draw):
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(DTYPES))
    rows, depth, outputs = draw(st.integers(0, 2)), draw(st.integers(1, 400)), draw(OUTPUTS)
    weights = [entries("normal", n, depth, seed=seed + i).to(dtype) for i, n in enumerate(outputs)]
    biases = [entries("normal", n, seed=seed).to(draw(st.sampled_from(DTYPES))) for n in outputs]
    biases = [bias if draw(st.booleans()) else None for bias in biases]
    residual = entries("normal", rows, sum(outputs), seed=seed) if draw(st.booleans()) else None
    return rows, depth, weights, biases, residual, seed


def check(result, reference, operands, weights, biases, *added) -> None:
    """Within the bound that holds for any order of summation."""
    exact = reference(*operands, [doubled(w) for w in weights], [doubled(b) for b in biases], *map(doubled, added))
    absolute = [operand.abs() if operand.is_floating_point() else operand for operand in operands]
    bound = reference(
        *absolute,
        [w.double().abs() for w in weights],
        [None if b is None else b.double().abs() for b in biases],
        *(None if each is None else each.double().abs() for each in added),
    )
    terms = operands[0].shape[1] + sum(each.shape[1] for each in added if each is not None and each.dim() > 1)
    assert result.dtype == torch.float32
    assert ((result.double() - exact).abs() <= (terms + 4) * EPS * bound + 1e-44).all()


@settings(max_examples=examples(20))
@given(problems(), st.data())
def test_sparse_linear(target, problem, data):
    rows, depth, weights, biases, residual, seed = problem
    k = data.draw(st.integers(0, depth) | st.sampled_from([0, depth]))
    values = entries("normal", rows, k, seed=seed)
    order = torch.rand(rows, depth, generator=seeded(seed)).argsort(1)[:, :k]
    indices = order.sort(1).values.int()
    result = target("sparse_linear", values, indices, [column_major(w) for w in weights], biases, residual)
    check(result, sparse_linear_reference, (values.double(), indices), weights, biases, residual)


@settings(max_examples=examples(20))
@given(problems(), st.integers(1, 400), st.data())
def test_a_residual_that_goes_through_an_adapter(target, problem, width, data):
    rows, depth, weights, biases, _, seed = problem
    k = data.draw(st.integers(0, depth))
    values, residual = entries("normal", rows, k, seed=seed), entries("normal", rows, width, seed=seed + 1)
    adapter = entries("normal", sum(map(len, weights)), width, seed=seed + 2).to(weights[0].dtype)
    indices = torch.arange(depth - k, depth, dtype=torch.int32).expand(rows, -1).contiguous()
    columns = [column_major(w) for w in weights]
    result = target("sparse_linear", values, indices, columns, biases, residual, column_major(adapter))
    check(result, sparse_linear_reference, (values.double(), indices), weights, biases, residual, adapter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "width", "depth", "k"), [(200, 500, 700, 350), (4096, 640, 900, 7), (200, 3, 13000, 12999)]
)
def test_an_adapter_where_blocks_have_a_multiprocessor_each(target, dtype, outputs, width, depth, k):
    """Outputs of which a small or a large GPU makes as many blocks, whose teams have short or very long lists."""
    values, residual = entries("normal", 1, k, seed=0), entries("normal", 1, width, seed=1)
    weight = entries("normal", outputs, depth, seed=2).to(dtype)
    adapter = entries("normal", outputs, width, seed=3).to(dtype)
    indices = torch.randperm(depth, generator=seeded(4))[:k].sort().values.int()[None]
    result = target("sparse_linear", values, indices, [column_major(weight)], [None], residual, column_major(adapter))
    check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], residual, adapter)


def digits(outputs: int, width: int, seed: int) -> torch.Tensor:
    """Of an adapter, column-major, the largest and the smallest among them."""
    drawn = torch.randint(-128, 128, (width, outputs), generator=seeded(seed), dtype=torch.int8)
    drawn.view(-1)[:2] = torch.tensor([-128, 127])[: drawn.numel()]
    return drawn.t()


@settings(max_examples=examples(30))
@given(problems(), st.integers(1, 400), st.data())
def test_a_residual_that_goes_through_an_adapter_of_digits(target, problem, width, data):
    rows, depth, weights, biases, _, seed = problem
    k, leading = data.draw(st.integers(0, depth)), data.draw(st.integers(0, width) | st.sampled_from([0, width]))
    values, residual = entries("normal", rows, k, seed=seed), entries("normal", rows, width, seed=seed + 1)
    outputs, beside = sum(map(len, weights)), data.draw(st.sampled_from([0, 1, 4, 8]))
    adapter = digits(beside + outputs, width + leading, seed + 2)[beside:]
    scale = entries("normal", outputs, seed=seed + 3)
    if data.draw(st.booleans()):
        scale = torch.exp2((4 * scale).round() - 7)
    scale = scale.to(data.draw(st.sampled_from(DTYPES)))
    indices = torch.arange(depth - k, depth, dtype=torch.int32).expand(rows, -1).contiguous()
    columns = [column_major(w) for w in weights]
    result = target("sparse_linear", values, indices, columns, biases, residual, adapter, scale)
    check(result, sparse_linear_reference, (values.double(), indices), weights, biases, residual, adapter, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "width", "leading", "depth", "k"),
    [(200, 500, 16, 700, 350), (4096, 640, 32, 900, 7), (200, 3, 0, 13000, 12999), (200, 4000, 4000, 40, 20)],
)
def test_digits_where_blocks_have_a_multiprocessor_each(target, dtype, outputs, width, leading, depth, k):
    values, residual = entries("normal", 1, k, seed=0), entries("normal", 1, width, seed=1)
    weight = entries("normal", outputs, depth, seed=2).to(dtype)
    adapter, scale = digits(outputs, width + leading, 3), entries("normal", outputs, seed=4).to(dtype)
    indices = torch.randperm(depth, generator=seeded(5))[:k].sort().values.int()[None]
    result = target("sparse_linear", values, indices, [column_major(weight)], [None], residual, adapter, scale)
    check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], residual, adapter, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 89])
def test_a_residual_that_is_not_finite_shows_through_digits(target, dtype, bad, place):
    """Also where a digit is 0, as the product of floats has it."""
    adapter, scale = digits(40, 90 + 16, 0), torch.full((40,), 0.5, dtype=dtype)
    adapter[::2, place] = 0
    residual = entries("normal", 2, 90, seed=1)
    residual[1, place] = bad
    operands = torch.zeros(2, 5), torch.arange(5, dtype=torch.int32).expand(2, -1).contiguous()
    weight = column_major(entries("normal", 40, 5, seed=2).to(dtype))
    result = target("sparse_linear", *operands, [weight], [None], residual, adapter, scale)
    exact = sparse_linear_reference(*operands, [weight], [None], residual, adapter, scale)
    torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-2, equal_nan=True)
    assert result[0].isfinite().all()
    assert not result[1].isfinite().any()


@settings(max_examples=examples(20))
@given(problems())
def test_linear(target, problem):
    rows, depth, weights, biases, residual, seed = problem
    x = entries("normal", rows, depth, seed=seed)
    result = target("linear", x, weights, biases, residual)
    check(result, linear_reference, (x.double(),), weights, biases, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "depth", "k"), [(96, 9000, 4500), (2048, 300, 150), (40, 3000, 3000)])
def test_large_sizes(target, dtype, outputs, depth, k):
    weight = entries("normal", outputs, depth, seed=0).to(dtype)
    values = entries("normal", 1, k, seed=1)
    indices = torch.randperm(depth, generator=seeded(2))[:k].sort().values.int()[None]
    result = target("sparse_linear", values, indices, [column_major(weight)], [None], None)
    check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], None)
    x = entries("normal", 1, depth, seed=3)
    check(target("linear", x, [weight], [None], None), linear_reference, (x.double(),), [weight], [None], None)


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_larger_matrices(target, dtype, start):
    """A slice starts anywhere in memory, and its columns or rows are further apart than it is high or wide."""
    whole = entries("normal", 128, 128, seed=0).to(dtype)
    columns = column_major(whole)[start : start + 64]
    values, indices = entries("normal", 1, 50, seed=1), torch.arange(0, 100, 2, dtype=torch.int32)[None]
    result = target("sparse_linear", values, indices, [columns], [None], None)
    check(result, sparse_linear_reference, (values.double(), indices), [columns], [None], None)
    x = entries("normal", 1, 64, seed=2)
    rows = whole[:, start : start + 64]
    check(target("linear", x, [rows], [None], None), linear_reference, (x.double(),), [rows], [None], None)


@pytest.mark.parametrize(("start", "beyond"), [(0, 0), (0, 1), (0, 4), (1, 7), (4, 4), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_of_a_larger_adapter(target, dtype, start, beyond):
    """Their address or their stride may be no whole piece where those of the weights are."""
    adapter = digits(start + 64 + beyond, 50 + 16, seed=0)[start : start + 64]
    weight, scale = entries("normal", 64, 30, seed=1).to(dtype), entries("normal", 64, seed=2)
    values, residual = entries("normal", 1, 30, seed=3), entries("normal", 1, 50, seed=4)
    indices = torch.arange(30, dtype=torch.int32)[None]
    result = target("sparse_linear", values, indices, [column_major(weight)], [None], residual, adapter, scale)
    check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], residual, adapter, scale)


def test_columns_that_are_not_listed_do_not_show(target):
    weight = torch.full((40, 30), torch.nan)
    weight[:, 3], weight[:, 5] = 1.0, torch.inf
    values = torch.tensor([[2.0, 1.0]])
    listed = torch.tensor([[3, 5]], dtype=torch.int32)
    assert target("sparse_linear", values, listed, [column_major(weight)], [None], None).eq(torch.inf).all()
    one = target("sparse_linear", values[:, :1], listed[:, :1], [column_major(weight)], [None], None)
    assert one.eq(2.0).all()


def test_weights_that_are_not_finite_spread(target):
    for bad in (torch.nan, torch.inf):
        weight = torch.ones(3, 20)
        weight[1, 19] = bad
        result = target("linear", torch.ones(1, 20), [weight], [None], None)
        torch.testing.assert_close(result, torch.tensor([[20.0, bad, 20.0]]), equal_nan=True)


RESIDUAL, DIGITS, SCALE = torch.zeros(1, 5), digits(4, 5, seed=0), torch.ones(4)


def with_digits(residual=RESIDUAL, adapter=DIGITS, scale=SCALE):
    """Arguments of a product of 4 outputs."""
    selection = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int32)
    return *selection, [torch.zeros(3, 4).t()], [None], residual, adapter, scale


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("linear", (torch.zeros(1, 4), [torch.zeros(4, 3).t()], [None], None), "row-major: weight.contiguous()"),
        ("linear", (torch.zeros(1, 4), [torch.zeros(3, 5)], [None], None), r"\[N, 4\], not of shape \(3, 5\)"),
        ("linear", (torch.zeros(1, 4), [torch.zeros(3, 4)], [torch.zeros(4)], None), "bias must be"),
        ("linear", (torch.zeros(1, 4).double(), [torch.zeros(3, 4)], [None], None), "x must be contiguous float32"),
        ("linear", (torch.zeros(1, 4), [torch.zeros(3, 4)], [None], torch.zeros(1, 4)), "residual must be"),
        (
            "sparse_linear",
            (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int32), [torch.zeros(3, 4)], [None], None),
            "larosa.ops.column_major",
        ),
        (
            "sparse_linear",
            (
                *(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int32), [torch.zeros(4, 3).t()], [None]),
                *(torch.zeros(1, 3), torch.zeros(5, 2).t()),
            ),
            r"residual must be contiguous float32 of shape \(1, 5\)",
        ),
        (
            "sparse_linear",
            (
                *(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int32), [torch.zeros(4, 3).t()], [None]),
                *(None, torch.zeros(5, 3).t()),
            ),
            "adapter must be",
        ),
        (
            "sparse_linear",
            (
                *(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int32), [torch.zeros(4, 3).t()], [None]),
                *(torch.zeros(1, 5), torch.zeros(5, 3).half().t()),
            ),
            "adapter must be torch.float32 like the weights",
        ),
        (
            "sparse_linear",
            with_digits(scale=None),
            "adapter must be torch.float32 like the weights, or int8 with a scale",
        ),
        ("sparse_linear", with_digits(adapter=torch.zeros(5, 4).t()), "or int8 with a scale"),
        ("sparse_linear", with_digits(adapter=None), r"\[4, D to 2 D\] for a residual \[1, D\]"),
        ("sparse_linear", with_digits(residual=None), r"\[4, D to 2 D\] for a residual \[1, D\]"),
        ("sparse_linear", with_digits(residual=torch.zeros(1, 6)), r"\[4, D to 2 D\]"),
        ("sparse_linear", with_digits(residual=torch.zeros(1, 2)), r"\[4, D to 2 D\]"),
        ("sparse_linear", with_digits(residual=torch.zeros(2, 5)), r"float32 of shape \(1, 5\)"),
        ("sparse_linear", with_digits(residual=torch.zeros(1, 5).half()), "residual must be contiguous"),
        ("sparse_linear", with_digits(adapter=digits(3, 5, seed=0)), r"adapter must be \[4, D\]"),
        ("sparse_linear", with_digits(adapter=DIGITS.contiguous()), "adapter must be column-major"),
        ("sparse_linear", with_digits(scale=torch.ones(3)), "adapter_scale must be a contiguous"),
        ("sparse_linear", with_digits(scale=torch.ones(4).double()), "adapter_scale must be a contiguous"),
        ("sparse_linear", with_digits(scale=torch.ones(8)[::2]), "adapter_scale must be a contiguous"),
        (
            "sparse_linear",
            (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), [torch.zeros(4, 3).t()], [None], None),
            "indices must be contiguous int32",
        ),
    ],
)
def test_what_cannot_be_multiplied(target, name, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        target(name, *arguments)
