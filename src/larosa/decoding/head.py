"""The language-model head as the engine reads it: whole, or of weights in planes what each token needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from larosa.architectures import Architecture
from larosa.decoding.linears import Linears, LowBitLinears, own, read_linears
from larosa.formats import ColumnFormat
from larosa.models import head_selector

_ops: Any = torch.ops.larosa


@dataclass(frozen=True)
class Head:
    """The head's weights, and above which threshold an entry of its input reads them; None where all do."""

    linears: Linears | LowBitLinears
    threshold: float | None = None
    score: torch.Tensor | None = None

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits [N, vocabulary] float32 of what the final norm gives, [N, D] float32."""
        if self.threshold is None:
            return self.linears.every(normed)
        values, indices, count = _ops.above(normed, self.threshold, self.score)
        return self.linears.listed(values, indices, None, (None, None), count)

    def whole(self) -> Head:
        """The same, with nothing skipped."""
        return replace(self, threshold=None, score=None)

    def rounded(self, form: ColumnFormat) -> Head:
        """The same over a copy of few bits, or over what it has where that is so already."""
        if not isinstance(self.linears, Linears):
            return self
        return replace(self, linears=self.linears.rounded(form, "the language-model head"))


def read_head(model: Any, architecture: Architecture) -> Head:
    """The head of a dense or sparsified model, over its own weights."""
    linears = read_linears([architecture.head(model)], by_columns=False)
    selector = head_selector(model, architecture)
    if selector is None or selector.threshold == 0:
        return Head(linears)
    return Head(linears, selector.threshold, own(selector.score))
