"""The parts of a sparsified decoder: selectors at the four sites, adapters on the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.architectures import Architecture
from larosa.config import GATE, SITES, KeepCounts, LarosaConfig, Prefill, Rotation, Thresholds
from larosa.errors import LarosaError
from larosa.formats import Adapter, AdapterFormat, ColumnFormat
from larosa.formats.adapters import INT8_ADAPTERS, AdapterStorage
from larosa.models.head import head_selector, quantize_head
from larosa.models.quantized import QuantizedLinear, quantized_like
from larosa.models.selectors import DenseTokens, Selector, Threshold, TopK, make_selector
from larosa.ops.adapter import adapt_reference
from larosa.utils.layer_files import in_memory


class SparseLinear(nn.Module):
    """A linear that sparsifies its input first; parameters, attributes and state-dict keys are those of `nn.Linear`.

    It is none itself: quantizers and serving engines replace every `nn.Linear` by one of their own, which would drop
    the selection without a word.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    selector: Selector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = S(x) W^T + b."""
        return F.linear(self.selector(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SparseActivation(nn.Module):
    """An MLP's gate activation that sparsifies its output: S(act(gate)) * up skips rows of up (CATS)."""

    def __init__(self, activation: nn.Module, selector: Selector) -> None:
        super().__init__()
        self.activation = activation
        self.selector = selector

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        """S(act(gate))."""
        sparse: torch.Tensor = self.selector(self.activation(gate))
        return sparse


class Int8Adapter(nn.Module):
    """A residual adapter of 8-bit numbers: `adapt_reference` with these parameters, which are not trained."""

    def __init__(self, width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale = INT8_ADAPTERS.empty(width, dtype, device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] in the next coordinates."""
        return adapt_reference(x, self.weight, self.scale)


class SparseDecoderLayer(nn.Module):
    """Forward pass of a sparsified decoder layer (paper, Figure 2), mixed into the family's own class.

    h2 and h4 are sparsified inside the attention's and the MLP's output projections, the gate inside the
    MLP; a site that the method leaves alone has an `nn.Identity`. The hidden state that goes in and comes
    out is in the rotated basis of this layer and of the next one. Between two bases an adapter takes the residual
    stream past attention or MLP, which write into the second by themselves: it waits for neither.
    """

    architecture: Architecture
    dense: DenseTokens
    h1: nn.Module
    h3: nn.Module
    attention_adapter: nn.Linear | Int8Adapter | None
    residual_adapter: nn.Linear | Int8Adapter | None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made as it is needed, so nobody finds it by name; that of the family is found.
        return _empty_layer, (type(self).__mro__[2],), self.__getstate__()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One layer over hidden_states [batch, positions, D]; other arguments go to the attention."""
        names = self.architecture
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers 5.24 has renamed it
        cached = None if cache is None else cache.get_seq_length(names.attention(self).layer_idx)
        self.dense.see(kwargs.get("position_ids"), cached)
        attention_input = self.h1(names.norm(self, "h1")(hidden_states))
        attention_output, _ = names.attention(self)(attention_input, *args, **kwargs)
        hidden_states = _carried(hidden_states, self.attention_adapter) + attention_output
        mlp_output = names.mlp(self)(self.h3(names.norm(self, "h3")(hidden_states)))
        return _carried(hidden_states, self.residual_adapter) + mlp_output


def _carried(hidden_states: torch.Tensor, adapter: nn.Module | None) -> torch.Tensor:
    """The residual stream in the basis behind an adapter."""
    if adapter is None:
        return hidden_states
    carried: torch.Tensor = adapter(hidden_states)
    return carried


_sparse_layer_classes: dict[type, type] = {}


def _sparse_layer_class(dense: type) -> type:
    # The same __name__, because transformers finds layers by it (_no_split_modules, recorded outputs).
    if dense not in _sparse_layer_classes:
        namespace = {"__module__": __name__, "__qualname__": dense.__qualname__}
        _sparse_layer_classes[dense] = type(dense.__name__, (SparseDecoderLayer, dense), namespace)
    return _sparse_layer_classes[dense]


def _empty_layer(dense: type) -> nn.Module:
    """A sparsified layer without anything in it, for pickle to fill."""
    cls: Any = _sparse_layer_class(dense)
    layer: nn.Module = cls.__new__(cls)
    return layer


def sparsify_layers(model: nn.Module, architecture: Architecture, config: LarosaConfig) -> None:
    """Turn the dense decoder layers of `model` into sparsified ones, in place.

    Adapters and scores are created uninitialised, for the caller or a checkpoint to fill.

    Raises:
        LarosaError: the counts do not fit the model's layers or sizes.
    """
    layers: list[Any] = list(architecture.layers(model))
    groups = config.rotation.groups(len(layers), config.layers_per_rotation)
    before_change = {group[-1] for group in groups[:-1]}
    key, noun = ("keep", "counts") if config.thresholds is None else ("thresholds", "thresholds")
    if config.layers != len(layers):
        raise LarosaError(
            f"config.json, key 'larosa.{key}': {noun} for {config.layers} layers, the model has {len(layers)}"
        )
    for index, layer in enumerate(layers):
        layer.__class__ = _sparse_layer_class(type(layer))
        layer.architecture = architecture
        layer.dense = DenseTokens(first=config.dense_first_token, prompts=config.prefill is Prefill.DENSE)
        layer.h1 = layer.h3 = nn.Identity()
        for site in config.method.sites:
            # What the gate lets through, down reads.
            weight = architecture.linears(layer, "h4" if site == GATE else site)[0].weight
            selector = make_selector(config, site, index, weight, layer.dense)
            if isinstance(selector, TopK):
                _check_count(selector.k, weight.shape[1], site, index)
            _PLACES[site].put(architecture, layer, site, selector)
        adapts = config.rotation is Rotation.BLOCK
        layer.attention_adapter = _adapter(layer, architecture, config.adapters) if adapts else None
        layer.residual_adapter = _adapter(layer, architecture, config.adapters) if index in before_change else None
        if config.linear_format is not None:
            quantize_layer(layer, architecture, config.linear_format)
    if config.head_format is not None:
        of_head = None if config.thresholds is None else config.thresholds.head
        quantize_head(model, architecture, config.head_format, 0.0 if of_head is None else of_head.value)


def quantize_layer(layer: nn.Module, architecture: Architecture, form: ColumnFormat) -> None:
    """Put linears of few bits in the place of a sparsified layer's, their codes and scales uninitialised."""
    for site in SITES:
        architecture.replace_linears(layer, site, partial(quantized_like, form))


def _check_count(k: int, width: int, site: str, layer: int) -> None:
    if k > width:
        raise LarosaError(f"config.json, key 'larosa.keep.{site}': layer {layer} keeps {k} of {width} entries")


class _Place(NamedTuple):
    """Where a site's selector is kept, as a pair of functions of (architecture, layer, site)."""

    put: Callable[[Architecture, Any, str, Selector], None]
    get: Callable[[Architecture, Any, str], Selector]


def _put_in_linear(architecture: Architecture, layer: Any, site: str, selector: Selector) -> None:
    linear: Any = architecture.linears(layer, site)[0]
    linear.__class__ = SparseLinear
    linear.selector = selector


def _get_from_linear(architecture: Architecture, layer: Any, site: str) -> Selector:
    linear: Any = architecture.linears(layer, site)[0]
    assert isinstance(linear, SparseLinear | QuantizedLinear), "the model is sparsified"
    assert isinstance(linear.selector, Selector)
    return linear.selector


def _put_in_gate(architecture: Architecture, layer: Any, site: str, selector: Selector) -> None:
    architecture.set_gate_activation(layer, SparseActivation(architecture.gate_activation(layer), selector))


def _get_from_gate(architecture: Architecture, layer: Any, site: str) -> Selector:
    activation = architecture.gate_activation(layer)
    assert isinstance(activation, SparseActivation), "the model is sparsified"
    return activation.selector


_IN_LAYER = _Place(
    put=lambda architecture, layer, site, selector: setattr(layer, site, selector),
    get=lambda architecture, layer, site: getattr(layer, site),
)
_IN_LINEAR = _Place(_put_in_linear, _get_from_linear)
_PLACES = {
    "h1": _IN_LAYER,
    "h2": _IN_LINEAR,
    "h3": _IN_LAYER,
    "h4": _IN_LINEAR,
    GATE: _Place(_put_in_gate, _get_from_gate),
}


def _adapter(layer: nn.Module, architecture: Architecture, adapters: AdapterFormat) -> nn.Linear | Int8Adapter:
    like = architecture.linears(layer, "h2")[0].weight
    if adapters is AdapterFormat.INT8:
        return Int8Adapter(len(like), device=like.device, dtype=like.dtype)
    # Without the usual random numbers, which would take all adapters' memory before there are any.
    size = len(like)
    return nn.utils.skip_init(nn.Linear, size, size, bias=False, device=like.device, dtype=like.dtype)


def adapter_storage(adapter: nn.Linear | Int8Adapter) -> AdapterStorage:
    """How an adapter of a sparsified model is stored."""
    return (AdapterFormat.INT8 if isinstance(adapter, Int8Adapter) else AdapterFormat.FULL).storage


@torch.no_grad()
def set_adapter(module: nn.Linear | Int8Adapter, adapter: Adapter) -> None:
    """Fill a residual adapter of a sparsified model, stored as that model stores them."""
    module.weight.copy_(adapter.weight)
    if isinstance(module, Int8Adapter):
        assert adapter.scale is not None, "8-bit numbers have a scale"
        module.scale.copy_(adapter.scale)


@torch.no_grad()
def set_scores(
    model: Any, architecture: Architecture, scores: Sequence[Mapping[str, torch.Tensor]] | None = None
) -> None:
    """Fill the scores of a sparsified model that has them, with those given or from its weights as they are.

    By weights, the score of an entry is the norm, over all linears that read the site, of what multiplies it:
    how far an entry of magnitude 1 moves their outputs together. It is computed in float64 and rounded once.

    Args:
        scores: for each layer those of its sites; None takes them from the weights.
    """
    found = selectors(model, architecture)
    for index, layer in enumerate(architecture.layers(model)):
        with nullcontext() if scores is not None else in_memory(layer):
            for site, site_selectors in found.items():
                score = getattr(site_selectors[index], "score", None)
                if score is not None:
                    readers = [linear.weight for linear in architecture.linears(layer, site)]
                    score.copy_(column_norms(readers) if scores is None else scores[index][site])


@torch.no_grad()
def set_planes(selector: Threshold, further: torch.Tensor) -> None:
    """Let a selector decide of each entry about several planes of the weights it is multiplied with.

    Args:
        further: scores of the planes after the first, [(planes - 1) D].
    """
    assert selector.score is not None, "scores tell planes apart"
    first = selector.score
    selector.planes = 1 + len(further) // len(first)
    selector.score = nn.Parameter(torch.cat([first, further.to(first)]), requires_grad=False)


#: Weights converted to float64 at a time, so that no matrix needs a whole float64 copy.
_PIECE = 2**24


def column_norms(weights: list[torch.Tensor]) -> torch.Tensor:
    """The norm of each column of matrices [out, D] put on top of each other, [D] float64."""
    squares = weights[0].new_zeros(weights[0].shape[1], dtype=torch.float64)
    for weight in weights:
        for rows in weight.split(max(_PIECE // weight.shape[1], 1)):
            squares += rows.double().square().sum(0)
    return squares.sqrt()


def selectors(model: Any, architecture: Architecture) -> dict[str, list[Selector]]:
    """The selectors of a sparsified model: for each site of its method one a layer, first layer first."""
    layers = architecture.layers(model)
    sites = LarosaConfig.parse(model.config.larosa).method.sites
    return {site: [_PLACES[site].get(architecture, layer, site) for layer in layers] for site in sites}


def set_keep_counts(model: nn.Module, architecture: Architecture, keep: KeepCounts) -> None:
    """Change how many entries the sites of a model sparsified by Top-K keep."""
    for site, site_selectors in selectors(model, architecture).items():
        for selector, k in zip(site_selectors, keep[site], strict=True):
            assert isinstance(selector, TopK), "the model counts"
            selector.k = k


def thresholds_of(model: nn.Module, architecture: Architecture) -> dict[str, list[float]]:
    """The thresholds of a model sparsified by them: for each site one a layer."""
    found = selectors(model, architecture)
    return {site: [cast(Threshold, selector).threshold for selector in of_site] for site, of_site in found.items()}


def set_thresholds(
    model: nn.Module, architecture: Architecture, thresholds: Thresholds | Mapping[str, Sequence[float]]
) -> None:
    """Change the thresholds of a model sparsified by them."""
    for site, site_selectors in selectors(model, architecture).items():
        for selector, threshold in zip(site_selectors, thresholds[site], strict=True):
            assert isinstance(selector, Threshold), "the model compares"
            selector.threshold = threshold
    of_head = head_selector(model, architecture)
    if of_head is not None:
        assert isinstance(thresholds, Thresholds), "a head in planes has one of its own"
        assert thresholds.head is not None, "as above"
        of_head.threshold = thresholds.head.value
