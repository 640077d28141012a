"""Adapters between two bases of the residual stream, as they are stored (paper, section 4.2).

What is stored is not quite the orthogonal matrix that was wanted, and need not be: the coordinates behind an adapter
are made those that the stored numbers lead to, and the weights are merged with them. So the rounding of an adapter
loses nothing of the residual stream, and nothing adds up from layer to layer. That coordinates are not quite those of
an orthogonal basis shows in two places only: a norm takes a vector's length from them, and directions are not quite
those that were looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from larosa.config import AdapterFormat
from larosa.ops.adapter import HIGH, leading_entries
from larosa.rotation.bases import LayerBases

_LARGEST = 127  # of a digit


class Frame(NamedTuple):
    """Coordinates x P of vectors x of the residual stream.

    `vectors` is P, [D, D] float64, and `dual` P^-T, the same matrix where the basis is orthogonal: what reads x by W
    reads its coordinates by W `dual`.
    """

    vectors: torch.Tensor
    dual: torch.Tensor


@dataclass(frozen=True)
class Adapter:
    """x <- x R: its R^T [D, D] in the model's dtype, or, with a scale, as `adapt_reference` has it."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def matrix(self) -> torch.Tensor:
        """R as it is stored, [D, D] float64."""
        if self.scale is None:
            return self.weight.T.double()
        width = len(self.weight)
        digits, high = self.weight[:, :width].double(), self.weight[:, width:]
        digits[:, : high.shape[1]] += HIGH * high
        return (digits * self.scale.double()[:, None]).T


class LayerFrames(NamedTuple):
    """What one decoder layer's `LayerBases` have become, with the adapters that lead to them.

    `before` comes from the layer before, whose last part it is; `between` leads from the attention's coordinates to
    the MLP's. Both are None where nothing changes.
    """

    attention: Frame | None
    mlp: Frame | None
    values: torch.Tensor | None = None
    before: Adapter | None = None
    between: Adapter | None = None


def connect(
    bases: Iterable[LayerBases], adapters: AdapterFormat = AdapterFormat.FULL, dtype: torch.dtype = torch.float64
) -> Iterator[LayerFrames]:
    """Put adapters between bases that differ; what is not rotated at all has no coordinates of its own.

    Args:
        bases: orthogonal ones, one set a layer, first layer first; drawn one at a time.
        adapters: how they are stored.
        dtype: of the model.
    """
    reached: tuple[torch.Tensor | None, Frame | None] = None, None  # a basis and what it has become
    for index, layer in enumerate(bases):
        start = (layer.attention, _orthogonal(layer.attention))
        attention, before = (start, None) if index == 0 else _next(reached, layer.attention, adapters, dtype)
        mlp, between = _next(attention, layer.mlp, adapters, dtype)
        yield LayerFrames(attention[1], mlp[1], layer.values, before, between)
        reached = mlp


def _next(
    reached: tuple[torch.Tensor | None, Frame | None],
    wanted: torch.Tensor | None,
    adapters: AdapterFormat,
    dtype: torch.dtype,
) -> tuple[tuple[torch.Tensor | None, Frame | None], Adapter | None]:
    basis, frame = reached
    if frame is None or wanted is None or wanted is basis:
        return reached, None
    adapter = make_adapter(adapters, frame.dual.T @ wanted, dtype)
    vectors = frame.vectors @ adapter.matrix()
    return (wanted, Frame(vectors, torch.linalg.inv(vectors).T)), adapter


def _orthogonal(Q: torch.Tensor | None) -> Frame | None:
    return None if Q is None else Frame(Q, Q)


def usual_format(dtype: torch.dtype) -> AdapterFormat:
    """How adapters of a model are stored where nobody says: by 8 bits where weights are rounded to 16 themselves."""
    return AdapterFormat.INT8 if dtype.itemsize == 2 else AdapterFormat.FULL


def make_adapter(adapters: AdapterFormat, R: torch.Tensor, dtype: torch.dtype) -> Adapter:
    """R [D, D] float64, rounded once, for a model of this dtype."""
    return int8_adapter(R, dtype) if adapters is AdapterFormat.INT8 else Adapter(R.T.to(dtype))


def int8_adapter(R: torch.Tensor, dtype: torch.dtype) -> Adapter:
    """R [D, D] float64 by a digit an entry, and two for those that multiply the stream's leading entries.

    A digit is of 8 bits. Scales are powers of two, one for each output, and so the same in every dtype.
    """
    wanted, leading = R.T, leading_entries(len(R))
    reach = torch.full((len(R),), float(_LARGEST)).to(R)
    reach[:leading] *= HIGH
    needed = (wanted.abs() / reach).amax(1).clamp_min(torch.finfo(torch.float16).smallest_normal)
    scale = needed.log2().ceil().exp2()
    steps = wanted / scale[:, None]
    high = (steps[:, :leading] / HIGH).round()
    steps[:, :leading] -= HIGH * high
    digits = torch.cat([steps.round(), high], dim=1).clamp(-_LARGEST, _LARGEST)
    return Adapter(digits.to(torch.int8), scale.to(dtype))
