"""Which entries of an activation survive: exactly k of them, or those above a threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from larosa.config import LarosaConfig, Method, Prefill
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
    """Keeps exactly `k` entries of each token's activation (paper, equation 8)."""

    def __init__(self, k: int, dense_prefill: bool = False) -> None:
        super().__init__(dense_prefill)
        self.k = k

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        return keep_top_k(x, self.k)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"k={self.k}"


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


#: Each is made from its number in the configuration: a count or a threshold.
_SELECTORS: dict[Method, Any] = {
    Method.LAROSA: TopK,
    Method.TOPK: TopK,
    Method.TEAL: Threshold,
    Method.CATS: Threshold,
}


def make_selector(config: LarosaConfig, site: str, layer: int) -> Selector:
    """The selector of one site of one layer."""
    number = config.selection[site][layer]
    selector: Selector = _SELECTORS[config.method](number, dense_prefill=config.prefill is Prefill.DENSE)
    return selector
