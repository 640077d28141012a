"""Selections together with the products that read what they keep.

For a GPU's kernels alone, where one launch after another takes time.
"""

from __future__ import annotations

from typing import Any

import torch

from larosa.ops.linear import Biases, Weights, sparse_linear_reference
from larosa.ops.norm import silu_mul_reference
from larosa.ops.schema import define
from larosa.ops.select import rms_norm_top_k_reference, top_k_reference


@define(
    "top_k_linear(Tensor x, int k, Tensor? score, Tensor[] weights, Tensor?[] biases, Tensor? residual=None, "
    "Tensor? adapter=None, Tensor? adapter_scale=None, Tensor(a!)? board=None) -> Tensor"
)
def _top_k_linear(x: torch.Tensor, k: int, score: torch.Tensor | None, weights: Weights, *_: Any) -> torch.Tensor:
    return x.new_empty(len(x), sum(len(weight) for weight in weights))


@define(
    "rms_norm_top_k_linear(Tensor x, Tensor? gain, float eps, int k, Tensor? score, Tensor[] weights, "
    "Tensor?[] biases, Tensor? residual=None) -> Tensor"
)
def _rms_norm_top_k_linear(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    return _top_k_linear(x, k, score, *product)


@define(
    "rms_norm_top_k_swiglu(Tensor x, Tensor? gain, float eps, int k, Tensor? score, Tensor[] weights, "
    "Tensor?[] biases) -> Tensor"
)
def _rms_norm_top_k_swiglu(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    gate, _ = product[0]
    return x.new_empty(len(x), len(gate))


def top_k_linear_reference(
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
    """`sparse_linear` of `top_k`.

    Args:
        x: [B, D] float32.
        k: entries that are kept.
        score: [D] of any float dtype, or None.
        weights: as of `sparse_linear`, as are the others.
        biases: one [N_i] or None a matrix.
        residual: [B, sum of N_i], or what the adapter takes.
        adapter: [sum of N_i, M], or None.
        adapter_scale: [sum of N_i], or None.
        board: [1] int64, zero, which a GPU's kernel may write to while it runs, so that calls at the same time must not
            share it. With one, where there is an adapter, one block may select for all.

    Returns:
        [B, sum of N_i] float32.
    """
    return sparse_linear_reference(*top_k_reference(x, k, score), weights, biases, residual, adapter, adapter_scale)


def rms_norm_top_k_linear_reference(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """`sparse_linear` of `rms_norm_top_k`; `product` are its weights, biases and residual."""
    return sparse_linear_reference(*rms_norm_top_k_reference(x, gain, eps, k, score), *product)


def rms_norm_top_k_swiglu_reference(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """`silu_mul` of `rms_norm_top_k_linear` by an MLP's gate and up, matrices of one size."""
    return silu_mul_reference(rms_norm_top_k_linear_reference(x, gain, eps, k, score, *product))
