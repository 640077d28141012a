"""`rms_norm` and `silu_mul` against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from tests.examples import examples

from .cases import DTYPES, WIDTHS, chances, doubled

ops = torch.ops.larosa


def close(result, exact, tolerance) -> None:
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, exact.float(), rtol=tolerance, atol=1e-37, equal_nan=True)


@settings(max_examples=examples(1000))
@given(chances(), st.integers(0, 4), WIDTHS, st.sampled_from(DTYPES), st.sampled_from([0.0, 1e-6, 1e-5]))
def test_rms_norm(chance, rows, width, dtype, eps):
    x, gain = chance.tensor(rows, width), chance.maybe(width, dtype=dtype)
    close(ops.rms_norm(x, gain, eps), rms_norm_reference(x.double(), doubled(gain), eps), 3e-7)


def test_an_entry_too_small_for_float32_before_its_infinite_gain():
    x, gain = torch.ones(1, 31), torch.ones(31)
    x[0, 3], x[0, 16], gain[16] = torch.finfo(torch.float32).max, 1e-45, torch.inf
    assert ops.rms_norm(x, gain, 0.0)[0, 16] == torch.inf


def check_silu_mul(gate_up) -> None:
    """Within 1e-6; silu itself loses what is below the smallest normal float, times |gate|."""
    result, exact = ops.silu_mul(gate_up), silu_mul_reference(gate_up.double())
    lost = 1e-36 * gate_up.double().chunk(2, dim=-1)[1].abs().nan_to_num(posinf=0)
    near = (result.double() - exact).abs() <= 1e-6 * exact.abs() + lost + 1e-44
    alike = (result == exact.float()) | (result.isnan() & exact.isnan())
    assert result.dtype == torch.float32
    assert (near | alike).all()


@settings(max_examples=examples(1000))
@given(chances(), st.integers(0, 4), WIDTHS)
def test_silu_mul(chance, rows, width):
    gate_up = chance.tensor(rows, 2 * width)
    # Half of the smallest number is nothing, and nothing times infinity is not a number.
    check_silu_mul(torch.where(gate_up.abs() < 1e-37, 0, gate_up))


def test_silu_everywhere():
    gate = torch.linspace(-110, 110, 100_003)
    check_silu_mul(torch.stack([gate, torch.ones_like(gate)]).view(1, -1))


def test_huge_entries_do_not_overflow_the_sum_of_squares():
    x = torch.tensor([[3e38, -3e38, 1e38, 0.0]])
    close(ops.rms_norm(x, None, 1e-5), rms_norm_reference(x.double(), None, 1e-5), 3e-7)
