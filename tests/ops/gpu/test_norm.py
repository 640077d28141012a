"""`rms_norm` and `silu_mul` against float64, `embed` bit by bit."""

import pytest
import torch

from larosa.ops.cuda import kernels
from larosa.ops.embed import embed_reference
from larosa.ops.greedy import NO_TOKEN
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "width"), [(1, 1), (300, 100), (7, 2049)])
def test_embed(target, dtype, vocabulary, width):
    embedding = entries("special", vocabulary, width, seed=0).to(dtype)
    for tokens in ([0], [vocabulary - 1, NO_TOKEN, vocabulary // 2], []):
        listed = torch.tensor(tokens, dtype=torch.int64)
        result = target("embed", embedding, listed)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, embed_reference(embedding, listed), rtol=0, atol=0, equal_nan=True)


def test_what_cannot_be_embedded(target):
    if target.kernels is not kernels:
        pytest.skip("PyTorch's own check")
    assert target("embed", torch.ones(3, 4), torch.tensor([3])).isnan().all()
    with pytest.raises(ValueError, match="embedding must be contiguous"):
        target("embed", torch.zeros(3, 4).t(), torch.tensor([0]))
    with pytest.raises(ValueError, match="tokens must be contiguous int64"):
        target("embed", torch.zeros(3, 4), torch.tensor([0], dtype=torch.int32))
