"""Adapters between two bases of the residual stream, as they are stored (paper, section 4.2).

What is stored is not quite the orthogonal matrix that was wanted, and need not be: the coordinates behind an adapter
are made those that the stored numbers lead to, and the weights are merged with them. So the rounding of an adapter
loses nothing of the residual stream, and nothing adds up from layer to layer. That coordinates are not quite those of
an orthogonal basis shows in two places only: a norm takes a vector's length from them, and directions are not quite
those that were looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from larosa.formats import Adapter, AdapterFormat
from larosa.rotation.bases import LayerBases


class Frame(NamedTuple):
    """Coordinates x P of vectors x of the residual stream.

    `vectors` is P, [D, D] float64, and `dual` P^-T, the same matrix where the basis is orthogonal: what reads x by W
    reads its coordinates by W `dual`.
    """

    vectors: torch.Tensor
    dual: torch.Tensor


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
    adapter = adapters.storage.pack(frame.dual.T @ wanted, dtype)
    vectors = frame.vectors @ adapters.storage.unpack(adapter)
    return (wanted, Frame(vectors, torch.linalg.inv(vectors).T)), adapter


def _orthogonal(Q: torch.Tensor | None) -> Frame | None:
    return None if Q is None else Frame(Q, Q)
