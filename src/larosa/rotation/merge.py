"""Fold the norm gains and merge the rotations into the weights (paper, section 3.2 and Figure 2).

Every weight is read once, transformed in float64 and rounded once to its own dtype: folding and
rotating in two steps would round twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.errors import LarosaError
from larosa.rotation.bases import LayerBases


@dataclass
class Adapters:
    """The residual adapters of one decoder layer (paper, section 4.2), each R [D, D] for x <- x R.

    `attention` sits between attention and MLP (rotation level `block` only), `residual` after the layer.
    """

    attention: torch.Tensor | None = None
    residual: torch.Tensor | None = None


#: Rows converted to float64 at a time, so that a large vocabulary needs no float64 copy of itself.
_ROWS = 8192


def merge_bases(model: nn.Module, architecture: Architecture, bases: Iterable[LayerBases]) -> list[Adapters]:
    """Rotate `model` in place into the given bases, one pair a layer, first layer first.

    `bases` may be a generator that still runs the model: layer l is changed only after its bases have
    been drawn, and layers after it not yet. The embedding is changed last for the same reason.

    Args:
        model: a dense causal language model whose head is not tied to its embedding.
        bases: as many pairs as the model has layers.

    Returns:
        Each layer's residual adapters, on the CPU in the model's dtype; None where both sides share a basis.

    Raises:
        LarosaError: a weight holds NaN or Inf.
    """
    layers = architecture.layers(model)
    adapters = [Adapters() for _ in layers]
    first = previous = None
    for index, (layer, basis) in enumerate(zip(layers, bases, strict=True)):
        _merge_layer(layer, index, architecture, basis)
        dtype = architecture.linears(layer, "h2")[0].weight.dtype
        if basis.attention is not basis.mlp:
            adapters[index].attention = (basis.attention.T @ basis.mlp).to("cpu", dtype)
        if previous is not None and previous.mlp is not basis.attention:
            adapters[index - 1].residual = (previous.mlp.T @ basis.attention).to("cpu", dtype)
        first = first or basis
        previous = basis
    assert first is not None, "a model has at least one layer"
    assert previous is not None
    embedding, head = architecture.embedding(model), architecture.head(model)
    norm = architecture.final_norm(model)
    _rotate_input(embedding.weight, first.attention, None, "the embedding")
    _rotate_input(head.weight, previous.mlp, norm.weight, "the language-model head")
    _reset_gain(norm)
    return adapters


def _merge_layer(layer: nn.Module, index: int, architecture: Architecture, basis: LayerBases) -> None:
    for input_site, output_site, Q in (("h1", "h2", basis.attention), ("h3", "h4", basis.mlp)):
        norm = architecture.norm(layer, input_site)
        for linear in architecture.linears(layer, input_site):
            _rotate_input(linear.weight, Q, norm.weight, f"layer {index}, site {input_site}")
        for linear in architecture.linears(layer, output_site):
            _rotate_output(linear, Q, f"layer {index}, site {output_site}")
        _reset_gain(norm)


@torch.no_grad()
def _rotate_input(weight: torch.Tensor, Q: torch.Tensor, gain: torch.Tensor | None, where: str) -> None:
    """W <- W diag(gain) Q, in place; W is [out, D]."""
    if gain is not None:
        Q = gain.to(Q)[:, None] * Q
    for rows in weight.split(_ROWS):
        rows.copy_(rows.to(Q) @ Q)
    _check_finite(weight, where)


@torch.no_grad()
def _rotate_output(linear: nn.Linear, Q: torch.Tensor, where: str) -> None:
    """W <- Q^T W and b <- b Q, in place; W is [D, in]."""
    for columns in linear.weight.split(_ROWS, dim=1):
        columns.copy_(Q.T @ columns.to(Q))
    _check_finite(linear.weight, where)
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.to(Q) @ Q)


@torch.no_grad()
def _reset_gain(norm: Any) -> None:
    norm.weight.fill_(1.0)


def _check_finite(weight: torch.Tensor, where: str) -> None:
    if not weight.isfinite().all():
        raise LarosaError(f"{where}: a weight is NaN or Inf, or overflows {weight.dtype} once rotated")
