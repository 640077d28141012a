"""Pruning by a fixed threshold on the magnitude (paper, equation 5), or on magnitude times score."""

import torch


def drop_up_to(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> torch.Tensor:
    """Zero the entries of `x` whose magnitude, times the score if any, is at most `threshold`; NaN survives.

    Args:
        x: [..., D] of any float dtype.
        threshold: not negative; compared in the dtype of `x`.
        score: [D], not negative; the product is taken in the dtype of `x`.
    """
    weighted = x if score is None else x * score.to(x.dtype)
    return torch.where(weighted.abs() <= threshold, torch.zeros((), dtype=x.dtype, device=x.device), x)
