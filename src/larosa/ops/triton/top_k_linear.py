"""Selections with their products, by count or by threshold: launches one after the other."""

from __future__ import annotations

from typing import Any

import torch

from larosa.ops import checks
from larosa.ops.linear import Biases, Weights
from larosa.ops.triton.linear import sparse_linear
from larosa.ops.triton.norm import silu_mul
from larosa.ops.triton.select import above, rms_norm_above, rms_norm_top_k, top_k


def top_k_linear(
    x: torch.Tensor,
    k: int,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
    board: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `top_k_linear_reference`; a board is of no use."""
    checks.board(board)
    return sparse_linear(*top_k(x, k, score), weights, biases, residual, adapter, adapter_scale)


def rms_norm_top_k_linear(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """See `rms_norm_top_k_linear_reference`."""
    return sparse_linear(*rms_norm_top_k(x, gain, eps, k, score), *product)


def rms_norm_top_k_swiglu(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """See `rms_norm_top_k_swiglu_reference`."""
    checks.gate_and_up([len(weight) for weight in product[0]])
    return silu_mul(rms_norm_top_k_linear(x, gain, eps, k, score, *product))


def above_linear(
    x: torch.Tensor,
    threshold: float,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `above_linear_reference`."""
    checks.vector("score", score, checks.vectors("x", x)[1])
    values, indices, count = above(x, threshold, score)
    return sparse_linear(values, indices, weights, biases, residual, adapter, adapter_scale, count)


def rms_norm_above_linear(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    threshold: float,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rms_norm_above_linear_reference`."""
    checks.vector("score", score, checks.vectors("x", x)[1])
    values, indices, count = rms_norm_above(x, gain, eps, threshold, score)
    return sparse_linear(values, indices, weights, biases, residual, count=count)


def rms_norm_above_swiglu(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """See `rms_norm_above_swiglu_reference`."""
    checks.gate_and_up([len(weight) for weight in product[0]])
    return silu_mul(rms_norm_above_linear(x, gain, eps, threshold, score, *product))
