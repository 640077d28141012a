"""`rms_norm` and `silu_mul` against float64."""

import pytest
import torch

from larosa.ops.norm import rms_norm_reference, silu_mul_reference

from .cases import DTYPES, doubled, entries


@pytest.mark.parametrize("kind", ["normal", "zero", "tied"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 300), (2, 2049), (0, 8)])
def test_rms_norm(target, kind, rows, width):
    x = entries(kind, rows, width, seed=0)
    for gain in (None, *(entries("normal", width, seed=1).to(dtype) for dtype in DTYPES)):
        result = target("rms_norm", x, gain, 1e-5)
        torch.testing.assert_close(
            result.double(), rms_norm_reference(x.double(), doubled(gain), 1e-5), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("kind", ["normal", "zero", "special"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 300), (2, 1025), (0, 8)])
def test_silu_mul(target, kind, rows, width):
    gate_up = entries(kind, rows, 2 * width, seed=0)
    expected = silu_mul_reference(gate_up.double())
    expected = torch.where(expected.abs() > torch.finfo(torch.float32).max, expected.sign() * torch.inf, expected)
    result = target("silu_mul", gate_up)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-37, equal_nan=True)
