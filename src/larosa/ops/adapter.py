"""The residual stream's way into another basis, by 8-bit numbers (paper, section 4.2)."""

from __future__ import annotations

import torch

from larosa.formats.adapters import INT8_ADAPTERS
from larosa.ops.schema import define


@define("adapt(Tensor x, Tensor weight, Tensor scale) -> Tensor")
def _adapt(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(x), len(weight))


def adapt_reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale * (W [x, 128 x_leading]): the first entries of x, which are the largest, have two digits each.

    Args:
        x: [..., D], of any float dtype.
        weight: [N, D + leading] int8: for each output a low digit for every entry, then high digits for the first
            `leading` of them.
        scale: [N], of any float dtype.

    Returns:
        [..., N] like `x`.
    """
    width = x.shape[-1]
    # The matrix is scaled, not its result, nor are entries of x multiplied: either could overflow in float16.
    matrix = INT8_ADAPTERS.factors(weight, scale, width, x.dtype)
    return torch.cat([x, x[..., : weight.shape[1] - width]], dim=-1) @ matrix.T
