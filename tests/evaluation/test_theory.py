import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from larosa.evaluation.theory import theoretical_relative_error

WIDTH, OUTPUTS, TOKENS = 4096, 64, 400


@pytest.mark.parametrize("kept", [0.05, 0.25, 0.5, 0.75, 0.9])
def test_monte_carlo(kept):
    """Gaussian activations and weights, Top-K, and the outputs multiplied out."""
    generator = torch.Generator().manual_seed(int(kept * 100))
    k = round(kept * WIDTH)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) * 0.3
    W = torch.randn(OUTPUTS, WIDTH, generator=generator, dtype=torch.float64) * 2
    dropped = x.scatter(-1, x.abs().topk(k).indices, 0.0)
    errors, lengths = (dropped @ W.T).square().sum(-1), (x @ W.T).square().sum(-1)
    # One W for all tokens: its columns' lengths vary, so let batches of outputs stand for the statistical error.
    found = math.sqrt(float(errors.mean() / lengths.mean()))
    per_output = ((dropped @ W.T).square().mean(0) / (x @ W.T).square().mean(0)).sqrt()
    deviation = float(per_output.std()) / math.sqrt(OUTPUTS)
    assert abs(found - theoretical_relative_error(k, WIDTH)) < 4 * deviation
    assert deviation < 0.02 * found


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_equals_the_integral(kept):
    """The squared error is the dropped part of the variance: the integral of z^2 phi(z) over |z| < t."""
    z = torch.linspace(0, 10, 2_000_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    t = z[int((2 * torch.cumulative_trapezoid(density, z) < 1 - kept).sum())]
    below = z <= t
    expected = math.sqrt(float(2 * torch.trapezoid((z**2 * density)[below], z[below])))
    assert theoretical_relative_error(kept * 1000, 1000) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("width", [1, 7, 14336])
def test_edges(width):
    assert theoretical_relative_error(0, width) == 1
    assert theoretical_relative_error(width, width) == 0


@given(st.integers(2, 30000), st.data())
def test_falls_with_k_and_stays_below_the_dropped_share(width, data):
    k = data.draw(st.integers(1, width - 1))
    error = theoretical_relative_error(k, width)
    assert 0 <= error <= theoretical_relative_error(k - 1, width) <= 1
    # The smallest entries carry less than their share of the energy.
    assert error**2 <= 1 - k / width


@pytest.mark.parametrize(("k", "width"), [(-1, 8), (9, 8), (0, 0)])
def test_counts_out_of_range(k, width):
    with pytest.raises(ValueError, match="cannot keep"):
        theoretical_relative_error(k, width)
