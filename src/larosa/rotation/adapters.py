"""Adapters between two bases of the residual stream, as they are stored (paper, section 4.2).

What is stored is not quite the orthogonal matrix that was wanted, but it need not be: the basis behind an adapter is
made what the stored numbers lead to, and the weights are merged with that basis and its inverse. So the rounding of an
adapter loses nothing of the residual stream, and errors do not add up over layers. That the basis is not quite
orthogonal shows in two places only: a norm takes the length of a vector from its coordinates, and directions are not
quite those that were looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from larosa.config import AdapterFormat
from larosa.ops.adapter import HIGH, adapt_reference
from larosa.rotation.bases import LayerBases

_LARGEST = 127  # of a digit
_LEADING_STEP = 16


@dataclass(frozen=True)
class Adapter:
    """x <- x R, its matrix R^T [D, D] in the model's dtype, or as `adapt_reference` has it where there is a scale."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def matrix(self) -> torch.Tensor:
        """R as it is stored, [D, D] float64."""
        if self.scale is None:
            return self.weight.T.double()
        every = torch.eye(len(self.weight), dtype=torch.float64, device=self.weight.device)
        return adapt_reference(every, self.weight, self.scale)


def leading_entries(width: int) -> int:
    """How many of a stream's first entries have two digits: about 3%, which hold most of its length."""
    return min(width, _LEADING_STEP * -(-width // (32 * _LEADING_STEP)))


def full_adapter(R: torch.Tensor, dtype: torch.dtype) -> Adapter:
    """R [D, D] in the model's dtype."""
    return Adapter(R.T.to(dtype))


def int8_adapter(R: torch.Tensor, dtype: torch.dtype) -> Adapter:
    """R [D, D] float64 by one digit an entry, and two for the entries that go by the stream's first ones.

    Scales are powers of two, one for each output, so that they are the same in every dtype.
    """
    wanted, leading = R.T, leading_entries(len(R))
    first, others = wanted[:, :leading], wanted[:, leading:]
    needed = torch.maximum(
        first.abs().amax(1) / (_LARGEST * HIGH), others.abs().amax(1, keepdim=False) / _LARGEST if others.numel() else 0 * first[:, 0]
    )
    scale = torch.exp2(needed.clamp_min(torch.finfo(torch.float16).smallest_normal).log2().ceil())
    steps = wanted / scale[:, None]
    high = (steps[:, :leading] / HIGH).round().clamp(-_LARGEST, _LARGEST)
    steps[:, :leading] -= HIGH * high
    low = steps.round().clamp(-_LARGEST, _LARGEST)
    return Adapter(torch.cat([low, high], dim=1).to(torch.int8), scale.to(dtype))
