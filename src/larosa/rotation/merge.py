"""Fold the norm gains and merge the rotations into the weights (paper, section 3.2 and Figure 2).

Every weight is read once, transformed in float64 and rounded once to its own dtype: folding and
rotating in two steps would round twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture, Heads
from larosa.calibration.shelf import Shelf
from larosa.errors import LarosaError
from larosa.formats import Adapter
from larosa.rotation.adapters import Frame, LayerFrames
from larosa.utils.layer_files import in_memory


@dataclass
class Adapters:
    """The residual adapters of one decoder layer (paper, section 4.2), each R [D, D] for x <- x R + f(x).

    `attention` carries the residual stream past the attention (rotation level `block` only), `residual` past the
    MLP. What these add is merged into the coordinates behind the adapter, so that x R waits for neither.
    """

    attention: Adapter | None = None
    residual: Adapter | None = None


#: Rows or columns converted and checked at a time, so that no matrix needs a whole float64 copy.
_PIECE = 1024


def merge_bases(model: Any, architecture: Architecture, frames: Iterable[LayerFrames]) -> list[Adapters]:
    """Rotate `model` in place into the given bases, one set a layer, first layer first.

    `frames` (see `connect`) may be a generator that still runs the model: layer l is changed only after its bases have
    been drawn, and layers after it not yet. Its MLP writes into the coordinates of layer l + 1 and so is finished one
    draw later. The embedding is changed last for the same reason. Where the residual stream is not rotated,
    the norms keep their gains.

    Args:
        model: a dense causal language model, its head not tied to its embedding where the residual stream is rotated.
        frames: as many sets as the model has layers.

    Returns:
        Each layer's residual adapters, read from disk when they are looked at; None where both sides share a basis.

    Raises:
        LarosaError: a weight holds NaN or Inf, or the disk is full.
    """
    layers = architecture.layers(model)
    heads = Heads.of(model.config)
    adapters, shelf = [Adapters() for _ in layers], Shelf()
    first = last = None
    for index, (layer, frame) in enumerate(zip(layers, frames, strict=True)):
        with in_memory(layer):
            _merge_layer(layer, index, architecture, frame, heads)
        adapters[index].attention = _kept(frame.between, shelf)
        if index > 0:
            _merge_output(layers[index - 1], index - 1, architecture, "h4", frame.attention)
            adapters[index - 1].residual = _kept(frame.before, shelf)
        first = first or frame
        last = frame
    assert first is not None, "a model has at least one layer"
    assert last is not None
    _merge_output(layers[-1], len(layers) - 1, architecture, "h4", last.mlp)
    if first.attention is not None:
        embedding, head = architecture.embedding(model), architecture.head(model)
        norm = architecture.final_norm(model)
        _merge(embedding.weight, None, first.attention.vectors, "the embedding")
        _merge(head.weight, None, _folded(norm, last.mlp), "the language-model head")
        _reset_gain(norm)
    return adapters


def _kept(adapter: Adapter | None, shelf: Shelf) -> Adapter | None:
    """The same on disk: all of a large model's take gigabytes."""
    if adapter is None:
        return None
    scale = {} if adapter.scale is None else {"scale": adapter.scale}
    shelf.append({"weight": adapter.weight, **scale})
    tensors = shelf[len(shelf) - 1]
    return Adapter(tensors["weight"], tensors.get("scale"))


def _merge_layer(layer: nn.Module, index: int, architecture: Architecture, frame: LayerFrames, heads: Heads) -> None:
    """All of a layer but what its MLP writes, which is in the next layer's coordinates."""
    # As one matrix each: of all values, and of what the query heads make of them.
    values = mixed = None
    if frame.values is not None:
        values = torch.block_diag(*frame.values)
        mixed = torch.block_diag(*frame.values.repeat_interleave(heads.group, 0))
    for site, read in (("h1", frame.attention), ("h3", frame.mlp)):
        norm = architecture.norm(layer, site)
        for linear in architecture.linears(layer, site):
            left = values if linear is architecture.value(layer) else None
            _merge_linear(linear, left, _folded(norm, read), f"layer {index}, site {site}")
        if read is not None:
            _reset_gain(norm)
    _merge_output(layer, index, architecture, "h2", frame.mlp, mixed)


def _merge_output(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    site: str,
    after: Frame | None,
    right: torch.Tensor | None = None,
) -> None:
    """What a layer adds to the residual stream at h2 or h4, into the coordinates that the stream has `after` it."""
    left = None if after is None else after.vectors
    if left is None and right is None:
        return
    with in_memory(layer):
        for linear in architecture.linears(layer, site):
            _merge_linear(linear, left, right, f"layer {index}, site {site}")


def _folded(norm: Any, frame: Frame | None) -> torch.Tensor | None:
    """diag(gain) P^-T: what a reader behind the norm is multiplied with."""
    return None if frame is None else norm.weight.to(frame.dual)[:, None] * frame.dual


@torch.no_grad()
def _merge_linear(linear: nn.Linear, left: torch.Tensor | None, right: torch.Tensor | None, where: str) -> None:
    """W <- left^T W right and b <- b left, in place."""
    _merge(linear.weight, left, right, where)
    if left is not None and linear.bias is not None:
        linear.bias.copy_(linear.bias.to(left) @ left)


@torch.no_grad()
def _merge(weight: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, where: str) -> None:
    """W <- left^T W right, in place, a matrix that is None being the identity; W is [out, in]."""
    factor = right if left is None else left
    if factor is None:
        return
    pieces: Sequence[torch.Tensor] = [weight]
    if left is None or right is None:
        pieces = weight.split(_PIECE, dim=0 if left is None else 1)
    for piece in pieces:
        wide = piece.to(factor)
        if left is not None:
            wide = left.T @ wide
        if right is not None:
            wide = wide @ right
        piece.copy_(wide)
        if not piece.isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            mend = ": use --dtype bfloat16" if weight.dtype is torch.float16 else ""
            raise LarosaError(f"{where}: a weight is NaN or Inf, or overflows {dtype} once rotated{mend}")


@torch.no_grad()
def _reset_gain(norm: Any) -> None:
    norm.weight.fill_(1.0)
