"""Which entries of a vector the next product reads: their values and indices."""

from __future__ import annotations

import torch

from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.schema import define
from larosa.ops.top_k import top_k_mask

#: Values [B, k] and their indices [B, k] int32, ascending in each row.
Selection = tuple[torch.Tensor, torch.Tensor]
#: The same of rows of D entries in memory for D, [B, D] each, and how many they are, [B] int64; zeros stand behind
#: them. So shapes stay the same whatever is kept, and no host has to wait for a number. Where entries have several
#: columns each (`above_reference`) it is memory for all of them, and the indices are columns.
CountedSelection = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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


@define("above(Tensor x, float threshold, Tensor? score=None) -> (Tensor values, Tensor indices, Tensor count)")
def _above(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    return _counted_selection(x, x.shape[1], score)


@define(
    "rms_norm_above(Tensor x, Tensor? gain, float eps, float threshold, Tensor? score=None) "
    "-> (Tensor values, Tensor indices, Tensor count)"
)
def _rms_norm_above(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None = None
) -> CountedSelection:
    return _counted_selection(x, x.shape[1], score)


@define(
    "silu_mul_above(Tensor gate_up, float threshold, Tensor? score=None) "
    "-> (Tensor values, Tensor indices, Tensor count)"
)
def _silu_mul_above(gate_up: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    return _counted_selection(gate_up, gate_up.shape[1] // 2, score)


def _counted_selection(x: torch.Tensor, width: int, score: torch.Tensor | None) -> CountedSelection:
    columns = width if score is None else len(score)
    return *_selection(x, columns), x.new_empty(len(x), dtype=torch.int64)


def _selection(x: torch.Tensor, k: int) -> Selection:
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


def above_reference(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    """The entries whose magnitude is above a threshold, or that are NaN: how many, depends on the values.

    Args:
        x: [B, D], float32 (float64 for a reference).
        threshold: not negative; compared in the dtype of `x`.
        score: [D], not negative, any float dtype: magnitude times score is compared, a product in the dtype of `x`.
            [m D] where an entry has m columns, each with a score of its own: column c is of entry c % D.
    """
    if score is not None:
        x = x.repeat(1, columns_each(score, x.shape[1]))
    weighted = x if score is None else x * score.to(x.dtype)
    mask = ~(weighted.abs() <= threshold)
    # The kept ones first, each in their order: of one shape whatever is kept, for a graph to capture.
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    kept = mask.gather(-1, order)
    return torch.where(kept, x.gather(-1, order), 0), (order * kept).int(), mask.sum(-1)


def columns_each(score: torch.Tensor, width: int) -> int:
    """How many columns an entry has by the scores of all of them, for vectors of `width` entries.

    Raises:
        ValueError: the scores are of no whole number of columns an entry.
    """
    each, rest = divmod(score.numel(), width) if width else (1, score.numel())
    if rest or not each:
        raise ValueError(f"score must have {width} entries, or a multiple of it, not {score.numel()}")
    return each


def rms_norm_above_reference(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None = None
) -> CountedSelection:
    """`above` of `rms_norm`."""
    return above_reference(rms_norm_reference(x, gain, eps), threshold, score)


def silu_mul_above_reference(
    gate_up: torch.Tensor, threshold: float, score: torch.Tensor | None = None
) -> CountedSelection:
    """`above` of `silu_mul`."""
    return above_reference(silu_mul_reference(gate_up), threshold, score)
