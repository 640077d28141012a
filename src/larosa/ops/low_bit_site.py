"""A site of few bits in one operator: what makes its activation, the selection, and the product.

For a GPU's kernels alone, where one launch after another takes time.
"""

from __future__ import annotations

from typing import Any

import torch

from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import low_bit_linear_reference
from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.schema import define
from larosa.ops.select import above_reference, top_k_reference


@define(
    "low_bit_site(Tensor x, Tensor? gain, float? eps, Tensor? score, int? k, float? threshold, bool swiglu, "
    "Tensor[] codes, Tensor[] scales, int[] outputs, int group, str form, Tensor?[] biases, "
    "Tensor? residual=None, Tensor? adapter=None, Tensor? adapter_scale=None) -> Tensor"
)
def _low_bit_site(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float | None,
    score: torch.Tensor | None,
    k: int | None,
    threshold: float | None,
    swiglu: bool,
    codes: Weights,
    scales: Weights,
    outputs: list[int],
    *_: Any,
) -> torch.Tensor:
    return x.new_empty(len(x), sum(outputs) // (1 + swiglu))


def low_bit_site_reference(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float | None,
    score: torch.Tensor | None,
    k: int | None,
    threshold: float | None,
    swiglu: bool,
    codes: Weights,
    scales: Weights,
    outputs: list[int],
    group: int,
    form: str,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`low_bit_linear` of what is kept of x, or of its norm.

    Args:
        x: [B, D] float32.
        gain: [D] of any float dtype, or None: of the norm.
        eps: of the norm; None for x as it is.
        score: [D] of any float dtype, or None; with a threshold [m D] where an entry has m columns (see `above`).
        k: entries that are kept, those with the largest scores; None where a threshold says which, or all are.
        threshold: above which entries are kept; None where k says how many, or all are.
        swiglu: the matrices are an MLP's gate and up, and the result is silu(gate) * up.
        codes: as of `low_bit_linear`, as are the others.
        scales: as there.
        outputs: as there.
        group: as there.
        form: as there.
        biases: as there.
        residual: as there; none with `swiglu`.
        adapter: as there; none with a norm.
        adapter_scale: as there.

    Returns:
        [B, sum of N_i] float32, of gate and up one's.
    """
    if eps is not None:
        x = rms_norm_reference(x, gain, eps)
    indices: torch.Tensor | None = None
    count: torch.Tensor | None = None
    if k is not None:
        x, indices = top_k_reference(x, k, score)
    elif threshold is not None:
        x, indices, count = above_reference(x, threshold, score)
    weights = codes, scales, outputs, group, form, biases
    result = low_bit_linear_reference(x, indices, *weights, residual, count, adapter, adapter_scale)
    return silu_mul_reference(result) if swiglu else result
