"""Which entries of a vector the next product reads: their values and indices."""

from __future__ import annotations

import torch

from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.schema import define
from larosa.ops.top_k import top_k_mask

#: Values [B, k] and their indices [B, k] int32, ascending in each row.
Selection = tuple[torch.Tensor, torch.Tensor]


@define("top_k(Tensor x, int k, Tensor? score=None) -> (Tensor values, Tensor indices)")
def _top_k(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    return _selection(x, k)


@define(
    "rms_norm_top_k(Tensor x, Tensor? gain, float eps, int k, Tensor? score=None) -> (Tensor values, Tensor indices)"
)
def _rms_norm_top_k(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None = None
) -> Selection:
    return _selection(x, k)


@define("silu_mul_top_k(Tensor gate_up, int k, Tensor? score=None) -> (Tensor values, Tensor indices)")
def _silu_mul_top_k(gate_up: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    return _selection(gate_up, k)


@define("above(Tensor x, float threshold, Tensor? score=None) -> (Tensor values, Tensor indices)")
def _above(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> Selection:
    return _selection(x, torch.library.get_ctx().new_dynamic_size())


def _selection(x: torch.Tensor, k: int | torch.SymInt) -> Selection:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int32)


def top_k_reference(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """The `k` entries that `top_k_mask` marks in each row: exactly k, ties to the lowest index, NaN largest.

    Args:
        x: [B, D], float32 (float64 for a reference).
        k: entries to keep, 0 <= k <= D.
        score: [D], not negative, any float dtype; the product is taken and compared in the dtype of `x`.
    """
    mask = top_k_mask(x, k, None if score is None else score.to(x.dtype))
    return x[mask].view(len(x), k), mask.nonzero()[:, 1].int().view(len(x), k)


def rms_norm_top_k_reference(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None = None
) -> Selection:
    """`top_k` of `rms_norm`."""
    return top_k_reference(rms_norm_reference(x, gain, eps), k, score)


def silu_mul_top_k_reference(gate_up: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """`top_k` of `silu_mul`."""
    return top_k_reference(silu_mul_reference(gate_up), k, score)


def above_reference(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> Selection:
    """The entries whose magnitude is above a threshold, or that are NaN: how many, depends on the values.

    Args:
        x: [1, D], float32 (float64 for a reference).
        threshold: not negative; compared in the dtype of `x`.
        score: [D], not negative, any float dtype: magnitude times score is compared, a product in the dtype of `x`.
    """
    weighted = x if score is None else x * score.to(x.dtype)
    mask = ~(weighted.abs() <= threshold)
    return x[mask][None], mask.nonzero()[:, 1].int()[None]
