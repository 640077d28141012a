"""What produces the vectors that are sparsified: RMSNorm and the gated activation of the MLP."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.ops.schema import define


@define("rms_norm(Tensor x, Tensor? gain, float eps) -> Tensor")
def _rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


@define("silu_mul(Tensor gate_up) -> Tensor")
def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


def rms_norm_reference(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, row by row.

    Args:
        x: [B, D], float32 (float64 for a reference).
        gain: [D], any float dtype; None is 1.
        eps: added to the mean square.

    Returns:
        [B, D] like `x`.
    """
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return unit if gain is None else unit * gain.to(x.dtype)


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [B, 2 I], the gate's outputs and then up's, float32 (float64 for a reference).

    Returns:
        [B, I] like `gate_up`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
