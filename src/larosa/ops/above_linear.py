"""Entries above a threshold together with the products that read them.

For a GPU's kernels alone, where one launch after another takes time.
"""

from __future__ import annotations

from typing import Any

import torch

from larosa.ops.linear import Biases, Weights, sparse_linear_reference
from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.schema import define
from larosa.ops.select import above_reference


@define(
    "above_linear(Tensor x, float threshold, Tensor? score, Tensor[] weights, Tensor?[] biases, "
    "Tensor? residual=None, Tensor? adapter=None, Tensor? adapter_scale=None) -> Tensor"
)
def _above_linear(
    x: torch.Tensor, threshold: float, score: torch.Tensor | None, weights: Weights, *_: Any
) -> torch.Tensor:
    return x.new_empty(len(x), sum(len(weight) for weight in weights))


@define(
    "rms_norm_above_linear(Tensor x, Tensor? gain, float eps, float threshold, Tensor? score, Tensor[] weights, "
    "Tensor?[] biases, Tensor? residual=None) -> Tensor"
)
def _rms_norm_above_linear(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    return _above_linear(x, threshold, score, *product)


@define(
    "rms_norm_above_swiglu(Tensor x, Tensor? gain, float eps, float threshold, Tensor? score, Tensor[] weights, "
    "Tensor?[] biases) -> Tensor"
)
def _rms_norm_above_swiglu(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    gate, _ = product[0]
    return x.new_empty(len(x), len(gate))


def above_linear_reference(
    x: torch.Tensor,
    threshold: float,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sparse_linear` of `above`.

    Args:
        x: [B, D] float32.
        threshold: not negative.
        score: [D] of any float dtype, or None.
        weights: as of `sparse_linear`, as are the others.
        biases: one [N_i] or None a matrix.
        residual: [B, sum of N_i], or what the adapter takes.
        adapter: [sum of N_i, M], or None.
        adapter_scale: [sum of N_i], or None.

    Returns:
        [B, sum of N_i] float32.
    """
    values, indices, count = above_reference(x, threshold, score)
    return sparse_linear_reference(values, indices, weights, biases, residual, adapter, adapter_scale, count)


def rms_norm_above_linear_reference(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """`sparse_linear` of `rms_norm_above`; `product` are its weights, biases and residual."""
    return above_linear_reference(rms_norm_reference(x, gain, eps), threshold, score, *product)


def rms_norm_above_swiglu_reference(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """`silu_mul` of `rms_norm_above_linear` by an MLP's gate and up, matrices of one size."""
    return silu_mul_reference(rms_norm_above_linear_reference(x, gain, eps, threshold, score, *product))
