"""The token that logits make likeliest. For a GPU, where the host must not look at them."""

from __future__ import annotations

import math

import torch

from larosa.ops.schema import define

#: Stands for a token where the logits have NaN or Inf, so that nothing has to look at them on the way.
NO_TOKEN = -1


@define("greedy(Tensor logits) -> Tensor")
def _greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)


def greedy_reference(logits: torch.Tensor) -> torch.Tensor:
    """The index of the largest logit of each row.

    Args:
        logits: [B, vocabulary] float32.

    Returns:
        [B] int64, the first of equal ones; `NO_TOKEN` where a logit is NaN or the largest is infinite.
    """
    highest, best = logits.max(dim=-1)
    return torch.where(highest.abs() < math.inf, best, NO_TOKEN)
