"""The parts of a sparsified decoder: selectors at the four sites, adapters on the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.architectures import Architecture
from larosa.config import SITES, KeepCounts, LarosaConfig, Prefill, Rotation
from larosa.errors import LarosaError
from larosa.ops import keep_top_k


class TopK(nn.Module):
    """Keeps exactly `k` entries of each token's activation (paper, equation 8).

    With `dense_prefill`, inputs of more than one position, that is prompts, pass unchanged.
    """

    def __init__(self, k: int, dense_prefill: bool = False) -> None:
        super().__init__()
        self.k = k
        self.dense_prefill = dense_prefill

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., positions, D]."""
        if self.dense_prefill and x.shape[-2] > 1:
            return x
        return keep_top_k(x, self.k)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"k={self.k}"


class SparseLinear(nn.Linear):
    """A linear that sparsifies its input first; same parameters and state-dict keys as `nn.Linear`."""

    selector: TopK

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = S(x) W^T + b."""
        return F.linear(self.selector(x), self.weight, self.bias)


class SparseDecoderLayer(nn.Module):
    """Forward pass of a sparsified decoder layer (paper, Figure 2), mixed into the family's own class.

    h2 and h4 are sparsified inside the attention's and the MLP's output projections. The hidden state
    that goes in and comes out is in the rotated basis of this layer and of the next one.
    """

    architecture: Architecture
    h1: TopK
    h3: TopK
    attention_adapter: nn.Linear | None
    residual_adapter: nn.Linear | None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One layer over hidden_states [batch, positions, D]; other arguments go to the attention."""
        names = self.architecture
        attention_input = self.h1(names.norm(self, "h1")(hidden_states))
        attention_output, _ = names.attention(self)(attention_input, *args, **kwargs)
        hidden_states = hidden_states + attention_output
        if self.attention_adapter is not None:
            hidden_states = self.attention_adapter(hidden_states)
        mlp_output = names.mlp(self)(self.h3(names.norm(self, "h3")(hidden_states)))
        hidden_states = hidden_states + mlp_output
        if self.residual_adapter is not None:
            hidden_states = self.residual_adapter(hidden_states)
        return hidden_states


_sparse_layer_classes: dict[type, type] = {}


def _sparse_layer_class(dense: type) -> type:
    # The same __name__, because transformers finds layers by it (_no_split_modules, recorded outputs).
    if dense not in _sparse_layer_classes:
        namespace = {"__module__": __name__, "__qualname__": dense.__qualname__}
        _sparse_layer_classes[dense] = type(dense.__name__, (SparseDecoderLayer, dense), namespace)
    return _sparse_layer_classes[dense]


def sparsify_layers(model: nn.Module, architecture: Architecture, config: LarosaConfig) -> None:
    """Turn the dense decoder layers of `model` into sparsified ones, in place.

    Adapters are created uninitialised, for the caller or a checkpoint to fill.

    Raises:
        LarosaError: the counts do not fit the model's layers or sizes.
    """
    layers: list[Any] = list(architecture.layers(model))
    if len(config.keep.h1) != len(layers):
        raise LarosaError(
            f"config.json, key 'larosa.keep': counts for {len(config.keep.h1)} layers, the model has {len(layers)}"
        )
    for index, layer in enumerate(layers):
        layer.__class__ = _sparse_layer_class(type(layer))
        layer.architecture = architecture
        for site in SITES:
            width, k = architecture.linears(layer, site)[0].in_features, config.keep[site][index]
            if k > width:
                raise LarosaError(f"config.json, key 'larosa.keep.{site}': layer {index} keeps {k} of {width} entries")
            selector = TopK(k, dense_prefill=config.prefill is Prefill.DENSE)
            if site in ("h1", "h3"):
                setattr(layer, site, selector)
            else:
                (linear,) = architecture.linears(layer, site)
                linear.__class__ = SparseLinear
                linear.selector = selector
        last = index == len(layers) - 1
        block, layered = config.rotation is Rotation.BLOCK, config.rotation is Rotation.LAYER
        layer.attention_adapter = _adapter(layer, architecture) if block else None
        layer.residual_adapter = _adapter(layer, architecture) if (block or layered) and not last else None


def _adapter(layer: nn.Module, architecture: Architecture) -> nn.Linear:
    like = architecture.linears(layer, "h2")[0].weight
    return nn.Linear(len(like), len(like), bias=False, device=like.device, dtype=like.dtype)


def selectors(model: nn.Module, architecture: Architecture) -> dict[str, list[TopK]]:
    """The selectors of a sparsified model: for each site one a layer, first layer first."""
    layers: list[Any] = list(architecture.layers(model))
    return {
        "h1": [layer.h1 for layer in layers],
        "h2": [_selector(architecture, layer, "h2") for layer in layers],
        "h3": [layer.h3 for layer in layers],
        "h4": [_selector(architecture, layer, "h4") for layer in layers],
    }


def _selector(architecture: Architecture, layer: nn.Module, site: str) -> TopK:
    (linear,) = architecture.linears(layer, site)
    assert isinstance(linear, SparseLinear), "the model is sparsified"
    return linear.selector


def set_keep_counts(model: nn.Module, architecture: Architecture, keep: KeepCounts) -> None:
    """Change how many entries the sites of a sparsified model keep."""
    for site, site_selectors in selectors(model, architecture).items():
        for selector, k in zip(site_selectors, keep[site], strict=True):
            selector.k = k
