"""Exact Top-K sparsification of the last dimension (paper, equation 8)."""

import math

import torch

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def keep_top_k(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> torch.Tensor:
    """Zero all but the `k` entries of largest magnitude, or largest magnitude times score, in each row of `x`.

    Which entries those are, and the arguments, are those of `top_k_mask`.

    Returns:
        A tensor like `x`; `x` itself where k = D.

    Raises:
        ValueError: k is outside [0, D].
    """
    if k == x.shape[-1]:
        return x
    return torch.where(top_k_mask(x, k, score), x, torch.zeros((), dtype=x.dtype, device=x.device))


def top_k_mask(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> torch.Tensor:
    """Mark the `k` entries of largest magnitude, or largest magnitude times score, in each row of `x`.

    Exactly `k` entries are marked whatever the values: ties go to the lowest index, and NaN counts as
    larger than infinity, so it survives into a result instead of vanishing. All NaN count alike.

    Args:
        x: [..., D], float16, bfloat16, float32 or float64.
        k: entries to keep, 0 <= k <= D.
        score: [D], not negative and finite: what an entry of magnitude 1 counts. The product is taken, and
            compared, in the wider of the two dtypes and at least in float32. None counts all alike.

    Returns:
        [..., D] bool, k of them true in each row.

    Raises:
        ValueError: k is outside [0, D].
    """
    width = x.shape[-1]
    if not 0 <= k <= width:
        raise ValueError(f"cannot keep {k} of {width} entries")
    if k in (0, width):
        return torch.full_like(x, k == width, dtype=torch.bool)
    weighted = x if score is None else _wide(x, score) * score
    # The bits of a non-negative float, read as an integer, sort like the float, with NaN on top. NaN has many
    # bit patterns (a processor makes another one of infinity times zero than a conversion makes): one for all.
    infinity = torch.tensor(math.inf, dtype=weighted.dtype).view(_BITS[weighted.dtype]).item()
    magnitude = weighted.abs().view(_BITS[weighted.dtype]).clamp(max=infinity + 1)
    threshold = magnitude.kthvalue(width - k + 1, dim=-1, keepdim=True).values
    above = magnitude > threshold
    tied = magnitude == threshold
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))


def _wide(x: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(torch.promote_types(x.dtype, score.dtype), torch.float32))
