"""Which entries of an activation survive: exactly k of them, or those above a threshold."""

from __future__ import annotations

import torch
from torch import nn

from larosa.config import LarosaConfig, Prefill
from larosa.ops import drop_up_to, keep_top_k


class Selector(nn.Module):
    """Zeros some entries of each token's activation.

    With `dense_prefill`, inputs of more than one position, that is prompts, pass unchanged.
    """

    def __init__(self, dense_prefill: bool = False) -> None:
        super().__init__()
        self.dense_prefill = dense_prefill

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., positions, D]."""
        if self.dense_prefill and x.shape[-2] > 1:
            return x
        return self.select(x)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        raise NotImplementedError


class TopK(Selector):
    """Keeps exactly `k` entries of each token's activation (paper, equation 8).

    They are the largest by magnitude or, where there is a `score`, by magnitude times score.
    """

    score: nn.Parameter | None

    def __init__(self, k: int, dense_prefill: bool = False, score: torch.Tensor | None = None) -> None:
        super().__init__(dense_prefill)
        self.k = k
        self.score = None if score is None else nn.Parameter(score, requires_grad=False)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        return keep_top_k(x, self.k, self.score)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"k={self.k}" + ("" if self.score is None else ", scored")


class Threshold(Selector):
    """Keeps the entries whose magnitude is above `threshold` (paper, equation 5): how many, varies."""

    def __init__(self, threshold: float, dense_prefill: bool = False) -> None:
        super().__init__(dense_prefill)
        self.threshold = threshold

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        return drop_up_to(x, self.threshold)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"threshold={self.threshold:g}"


def make_selector(config: LarosaConfig, site: str, layer: int, weight: torch.Tensor) -> Selector:
    """The selector of one site of one layer.

    Args:
        weight: of a linear that reads the site, [out, D]. A score has its device and dtype and comes
            uninitialised, for the caller or a checkpoint to fill.
    """
    dense_prefill = config.prefill is Prefill.DENSE
    if config.thresholds is not None:
        return Threshold(config.thresholds[site][layer], dense_prefill)
    assert config.keep is not None, "validated"
    score = weight.new_empty(weight.shape[1]) if config.score.has_vectors else None
    return TopK(config.keep[site][layer], dense_prefill, score)
