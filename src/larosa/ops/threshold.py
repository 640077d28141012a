"""Magnitude pruning by a fixed threshold (paper, equation 5)."""

import torch


def drop_up_to(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Zero the entries of `x` whose magnitude is at most `threshold`; NaN is not, and survives.

    Args:
        x: of any shape and float dtype.
        threshold: not negative; compared in the dtype of `x`.
    """
    return torch.where(x.abs() <= threshold, torch.zeros((), dtype=x.dtype, device=x.device), x)
