"""A whole site of a layer as one operator, for devices where every kernel's start costs: norm, selection, products."""

from __future__ import annotations

from typing import Any

import torch

from larosa.ops.linear import Biases, Weights, linear_reference, sparse_linear_reference
from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.schema import define
from larosa.ops.select import top_k_reference


@define(
    "site(Tensor x, bool normed, Tensor? gain, float eps, int k, Tensor? score, Tensor[] weights, Tensor?[] biases, "
    "bool gated=False, Tensor? residual=None, Tensor? adapter=None) -> Tensor"
)
def _site(
    x: torch.Tensor,
    normed: bool,
    gain: torch.Tensor | None,
    eps: float,
    k: int,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
) -> torch.Tensor:
    outputs = sum(len(weight) for weight in weights)
    return x.new_empty(len(x), outputs // 2 if gated else outputs)


def site_reference(
    x: torch.Tensor,
    normed: bool,
    gain: torch.Tensor | None,
    eps: float,
    k: int,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual R^T + S(x) W^T + b, or silu(gate) * up of that: what a site's readers make of its k largest entries.

    Args:
        x: [B, D], float32 (float64 for a reference).
        normed: whether x goes through an RMSNorm first; `gain` and `eps` are its.
        gain: [D] or None.
        eps: of the norm.
        k: entries that are kept, 0 <= k <= D.
        score: [D] or None, see `top_k_reference`.
        weights: matrices [N_i, D] of one dtype. Kernels want them column-major.
        biases: one [N_i] or None a matrix.
        gated: the weights are an MLP's gate and up, and the result is what its down reads.
        residual: [B, sum of N_i] like `x`, added to the product; with an adapter [B, M]. Not with `gated`.
        adapter: R [sum of N_i, M] in the dtype of the weights, through which the residual goes; or None.

    Returns:
        [B, sum of N_i] like `x`, half of that if gated.
    """
    values, indices = top_k_reference(rms_norm_reference(x, gain, eps) if normed else x, k, score)
    if adapter is not None:
        assert residual is not None, "an adapter is the residual's"
        residual = linear_reference(residual, [adapter], [None])
    result = sparse_linear_reference(values, indices, weights, biases, residual)
    return silu_mul_reference(result) if gated else result


def site_by_parts(
    kernels: Any,
    x: torch.Tensor,
    normed: bool,
    gain: torch.Tensor | None,
    eps: float,
    k: int,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by the other operators of one set of kernels, one launch each."""
    if adapter is not None:
        every, at = kernels.top_k(residual, adapter.shape[1])
        residual = kernels.sparse_linear(every, at, [adapter], [None])
    selection = kernels.rms_norm_top_k(x, gain, eps, k, score) if normed else kernels.top_k(x, k, score)
    result: torch.Tensor = kernels.sparse_linear(*selection, weights, biases, residual)
    if gated:
        result = kernels.silu_mul(result)
    return result
