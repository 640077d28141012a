"""Which entries of an activation survive: exactly k of them, or those above a threshold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from larosa.config import LarosaConfig
from larosa.ops import drop_up_to, keep_top_k


class DenseTokens:
    """Which tokens of a running forward pass are left dense, the same at all sites of a layer.

    The first token of a text carries the attention sink, on which every head leans: `first` leaves it dense. With
    `prompts` so is whatever comes before a cache holds anything. Without a cache nothing tells a prompt from what
    follows it, and then everything counts as what follows.
    """

    def __init__(self, first: bool = False, prompts: bool = False) -> None:
        self.first = first
        self.prompts = prompts
        #: Tokens before this position are dense; for measurements, which stand for a prompt of that length.
        self.before = 0
        self._mask: torch.Tensor | bool = False

    def see(self, position_ids: torch.Tensor | None, cached: int | None) -> None:
        """Take note of what runs next.

        Args:
            position_ids: [batch or 1, positions], None where the caller has none.
            cached: tokens in the layer's cache, None without a cache.
        """
        before = max(self.before, int(self.first))
        if self.prompts and cached == 0:
            self._mask = True
        elif before == 0 or (cached or 0) >= before:
            self._mask = False
        else:
            assert position_ids is not None, "transformers gives its layers positions"
            self._mask = (position_ids < before)[..., None]

    def keep(self, x: torch.Tensor, sparse: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x [batch, positions, D] where tokens are dense, else `sparse(x)`."""
        if isinstance(self._mask, bool):
            return x if self._mask else sparse(x)
        return torch.where(self._mask.to(x.device), x, sparse(x))

    def sparse_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of x [batch, positions, D] that are not left dense, [tokens, D]."""
        if isinstance(self._mask, bool):
            return x.flatten(0, -2)[: 0 if self._mask else None]
        return x[~self._mask[..., 0].to(x.device).expand(x.shape[:-1])]


def copies(x: torch.Tensor, planes: int) -> torch.Tensor:
    """One copy of x [..., D] for each plane of a weight, side by side: [..., planes D], x itself for one."""
    return x if planes == 1 else torch.cat([x] * planes, dim=-1)


class Selector(nn.Module):
    """Zeros some entries of each token's activation, but for the tokens that are left dense.

    Where an entry is multiplied with several `planes` of a weight, each has a copy of its own, which is zeroed or not.
    """

    planes = 1

    def __init__(self, dense: DenseTokens | None = None) -> None:
        super().__init__()
        self.dense = dense or DenseTokens()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., positions, D], to [..., positions, planes D]."""
        return self.dense.keep(self.copies(x), self.select)

    def copies(self, x: torch.Tensor) -> torch.Tensor:
        """The copies of x [..., D], side by side."""
        return copies(x, self.planes)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        raise NotImplementedError


class TopK(Selector):
    """Keeps exactly `k` entries of each token's activation (paper, equation 8).

    They are the largest by magnitude or, where there is a `score`, by magnitude times score.
    """

    score: nn.Parameter | None

    def __init__(self, k: int, dense: DenseTokens | None = None, score: torch.Tensor | None = None) -> None:
        super().__init__(dense)
        self.k = k
        self.score = None if score is None else nn.Parameter(score, requires_grad=False)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        return keep_top_k(x, self.k, self.score)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"k={self.k}" + ("" if self.score is None else ", scored")


class Threshold(Selector):
    """Keeps the entries above `threshold` (paper, equation 5): how many, varies from token to token.

    Compared is the magnitude or, where there is a `score`, magnitude times score; each copy's has one of its own.
    """

    score: nn.Parameter | None

    def __init__(
        self,
        threshold: float,
        dense: DenseTokens | None = None,
        score: torch.Tensor | None = None,
        planes: int = 1,
    ) -> None:
        super().__init__(dense)
        self.threshold = threshold
        self.planes = planes
        self.score = None if score is None else nn.Parameter(score, requires_grad=False)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        return drop_up_to(x, self.threshold, self.score)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"threshold={self.threshold:g}" + ("" if self.score is None else ", scored")


def make_selector(config: LarosaConfig, site: str, layer: int, weight: torch.Tensor, dense: DenseTokens) -> Selector:
    """The selector of one site of one layer.

    Args:
        weight: of a linear that reads the site, [out, D]. A score has its device and dtype and comes
            uninitialised, for the caller or a checkpoint to fill.
        dense: shared by the layer's selectors.
    """
    planes = config.planes
    score = weight.new_empty(planes * weight.shape[1]) if config.score.has_vectors else None
    if config.thresholds is not None:
        return Threshold(config.thresholds[site][layer], dense, score, planes)
    assert config.keep is not None, "validated"
    return TopK(config.keep[site][layer], dense, score)
