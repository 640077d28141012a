"""`linear`, `sparse_linear` and `adapt` against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops import column_major
from larosa.ops.adapter import adapt_reference
from larosa.ops.linear import linear_reference, sparse_linear_reference
from tests.examples import examples

from .cases import DTYPES, WIDTHS, Chance, chances, doubled

ops = torch.ops.larosa
EPS = torch.finfo(torch.float32).eps


@st.composite
def problems(draw):
    chance = draw(chances())
    rows, depth = draw(st.integers(0, 4)), draw(WIDTHS)
    outputs = draw(st.lists(WIDTHS, min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    weights = [chance.tensor(n, depth, dtype=dtype) for n in outputs]
    biases = [chance.maybe(n, dtype=draw(st.sampled_from(DTYPES))) for n in outputs]
    return chance, rows, depth, weights, biases, chance.maybe(rows, sum(outputs))


def selection(chance: Chance, rows: int, depth: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.stack(
        [torch.randperm(depth, generator=chance.generator)[:k] for _ in range(rows)] or [torch.empty(0)]
    )
    return chance.tensor(rows, k), order[:rows].view(rows, k).sort(dim=1).values.int()


def check(chance: Chance, result: torch.Tensor, terms: int, reference, operands, biases, residual) -> None:
    """Exact where sums of integers are; within the bound of any order of summation elsewhere."""
    assert result.dtype == torch.float32
    exact = reference(*operands, [doubled(b) for b in biases], doubled(residual))
    if chance.kind == "integer":
        assert torch.equal(result.double(), exact)
    elif chance.kind == "special":  # subnormal numbers get lost beside others in an order that is not said
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-35, equal_nan=True)
    else:
        *arguments, weights = operands
        bound = reference(
            *(a.abs() if a.is_floating_point() else a for a in arguments),
            [w.abs() for w in weights],
            [None if b is None else b.double().abs() for b in biases],
            None if residual is None else residual.double().abs(),
        )
        assert ((result.double() - exact).abs() <= (terms + 4) * EPS * bound + 1e-44).all()


@settings(max_examples=examples(1500))
@given(problems(), st.data())
def test_sparse_linear_is_the_sum_of_the_columns_at_the_indices(problem, data):
    chance, rows, depth, weights, biases, residual = problem
    k = data.draw(st.one_of(st.sampled_from([0, depth]), st.integers(0, depth)))
    values, indices = selection(chance, rows, depth, k)
    result = chance.run(ops.sparse_linear, values, indices, [column_major(w) for w in weights], biases, residual)
    operands = (values.double(), indices, [w.double() for w in weights])
    check(chance, result, k, sparse_linear_reference, operands, biases, residual)


@settings(max_examples=examples(1500))
@given(problems())
def test_linear_is_the_product_with_every_row(problem):
    chance, rows, depth, weights, biases, residual = problem
    x = chance.tensor(rows, depth)
    result = chance.run(ops.linear, x, weights, biases, residual)
    operands = (x.double(), [w.double() for w in weights])
    check(chance, result, depth, linear_reference, operands, biases, residual)


@settings(max_examples=examples(1500))
@given(chances(), st.integers(0, 4), WIDTHS, WIDTHS, st.sampled_from(DTYPES), st.data())
def test_adapt_is_the_product_with_every_digit(chance, rows, width, outputs, dtype, data):
    leading = data.draw(st.sampled_from([0, 1, width // 2, width]))
    x, scale = chance.tensor(rows, width), chance.tensor(outputs, dtype=dtype)
    scale = torch.where(scale.isfinite(), scale, 1)
    weight = torch.randint(-128, 128, (outputs, width + leading), generator=chance.generator, dtype=torch.int8)
    if chance.kind == "integer":  # whose sums are exact
        weight %= 8
    result = chance.run(ops.adapt, x, weight, scale)
    exact = adapt_reference(x.double(), weight, scale)
    assert result.dtype == torch.float32
    if chance.kind == "integer":
        assert torch.equal(result.double(), exact)
    elif chance.kind == "special":
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-3, equal_nan=True)
    else:
        bound = adapt_reference(x.double().abs(), weight.double().abs(), scale.double().abs())
        assert ((result.double() - exact).abs() <= (width + leading + 4) * EPS * bound + 1e-44).all()
