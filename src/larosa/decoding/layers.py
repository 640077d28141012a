"""What one decoding step reads of a decoder layer: its weights, and which of their columns.

Sites are the paper's: h1 is read by q/k/v, h2 by the attention's output projection, h3 by gate/up, h4 by down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.config import SITES
from larosa.decoding.linears import Linears, LowBitLinears, lay_out, own, read_linears
from larosa.formats import ColumnFormat
from larosa.models import Selector, Threshold, TopK, selectors
from larosa.ops.select import CountedSelection, Selection
from larosa.parallel import Ranks, shard_of
from larosa.parallel.shard import TopKOfAll, adapter_inputs

_ops: Any = torch.ops.larosa

#: Tokens of one step at most: weights are read once for all of them where nothing is skipped, on a CPU elsewhere too.
MAX_ROWS = 8


@dataclass(frozen=True)
class Norm:
    """An RMSNorm, before h1 and h3."""

    gain: torch.Tensor
    eps: float
    carries: ClassVar[bool] = False  # whether `product` takes an adapter along where it counts, or none

    @property
    def norm(self) -> tuple[torch.Tensor, float]:
        """What x is normed by: gain and eps."""
        return self.gain, self.eps

    def every(self, x: torch.Tensor) -> torch.Tensor:
        """The normed x [B, D]."""
        normed: torch.Tensor = _ops.rms_norm(x, self.gain, self.eps)
        return normed

    def largest(self, x: torch.Tensor, k: int, score: torch.Tensor | None) -> Selection:
        """The k entries of the normed x [B, D] with the largest scores."""
        selection: Selection = _ops.rms_norm_top_k(x, self.gain, self.eps, k, score)
        return selection

    def above(self, x: torch.Tensor, threshold: float, score: torch.Tensor | None) -> CountedSelection:
        """The entries of the normed x [B, D] with scores above a threshold."""
        selection: CountedSelection = _ops.rms_norm_above(x, self.gain, self.eps, threshold, score)
        return selection

    def product(self, x: torch.Tensor, site: Site, residual: torch.Tensor | None, _: Adapter | None) -> torch.Tensor:
        """A site's outputs for the entries that it keeps, on top of a residual."""
        counts = site.threshold is None
        selected = (x, self.gain, self.eps, site.k if counts else site.threshold, site.score)
        if site.swiglu:
            gate_and_up = _ops.rms_norm_top_k_swiglu if counts else _ops.rms_norm_above_swiglu
            gated: torch.Tensor = gate_and_up(*selected, *site.weights)
            return gated
        linear = _ops.rms_norm_top_k_linear if counts else _ops.rms_norm_above_linear
        outputs: torch.Tensor = linear(*selected, *site.weights, residual)
        return outputs


class _AsItIs:
    """Nothing, before h2."""

    carries: ClassVar[bool] = False
    norm: ClassVar[tuple[None, None]] = None, None

    def every(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def largest(self, x: torch.Tensor, k: int, score: torch.Tensor | None) -> Selection:
        selection: Selection = _ops.top_k(x, k, score)
        return selection

    def above(self, x: torch.Tensor, threshold: float, score: torch.Tensor | None) -> CountedSelection:
        selection: CountedSelection = _ops.above(x, threshold, score)
        return selection

    def product(
        self, x: torch.Tensor, site: Site, residual: torch.Tensor | None, adapter: Adapter | None
    ) -> torch.Tensor:
        if site.threshold is None:
            counted: torch.Tensor = _ops.top_k_linear(x, site.k, site.score, *site.weights, residual)
            return counted
        along = (None, None) if adapter is None else (adapter.weight, adapter.scale)
        outputs: torch.Tensor = _ops.above_linear(x, site.threshold, site.score, *site.weights, residual, *along)
        return outputs


@dataclass(frozen=True)
class _Long(_AsItIs):
    """The same before h4, where entries are too many for each block of a product to select the k largest.

    One block selects for all, which read an adapter meanwhile; `board` [1] int64 is where it tells them.
    """

    board: torch.Tensor
    carries: ClassVar[bool] = True

    def product(
        self, x: torch.Tensor, site: Site, residual: torch.Tensor | None, adapter: Adapter | None
    ) -> torch.Tensor:
        if site.threshold is not None:
            return super().product(x, site, residual, adapter)
        assert adapter is not None, "it carries one"
        along = (residual, adapter.weight, adapter.scale, self.board)
        outputs: torch.Tensor = _ops.top_k_linear(x, site.k, site.score, *site.weights, *along)
        return outputs


class _Gated:
    """The MLP's silu(gate) * up, before h4."""

    def every(self, x: torch.Tensor) -> torch.Tensor:
        activation: torch.Tensor = _ops.silu_mul(x)
        return activation

    def largest(self, x: torch.Tensor, k: int, score: torch.Tensor | None) -> Selection:
        selection: Selection = _ops.silu_mul_top_k(x, k, score)
        return selection

    def above(self, x: torch.Tensor, threshold: float, score: torch.Tensor | None) -> CountedSelection:
        selection: CountedSelection = _ops.silu_mul_above(x, threshold, score)
        return selection


@dataclass(frozen=True)
class LargestOfAll:
    """The largest entries of a vector of so much `width`, of which each rank has a part."""

    ranks: Ranks
    width: int

    def own(self, values: torch.Tensor, k: int, score: torch.Tensor | None) -> CountedSelection:
        """Those of this rank's `values` [B, part] that are among the k largest; `score` is the whole vector's."""
        part = self.ranks.part(self.width)
        _, indices = _ops.top_k(self.ranks.gather(values, self.width).contiguous(), k, score)
        # Indices ascend, so that the rank's own stand side by side.
        before, until = ((indices < end).sum(dim=1) for end in (part.start, part.stop))
        places = torch.arange(min(k, values.shape[1]), device=values.device) + before[:, None]
        listed = indices.gather(1, places.clamp_max(k - 1)) - part.start
        listed = listed.clamp(0, values.shape[1] - 1)  # behind the count stands what is another rank's
        return values.gather(1, listed.long()), listed, until - before


@dataclass(frozen=True)
class Site:
    """One site of one layer: how its activation comes about, what is kept of it, and the linears that read it.

    With neither `k` nor `threshold` everything is kept, and the linears are read whole: on a CPU as `every` lists all
    columns, where it does, for one row, for two and so on. Where `fused` is there, one operator makes the activation,
    selects entries and multiplies with them, and where the linears are an MLP's gate and up (`swiglu`) it makes
    silu(gate) * up of them. With `of_all` the k entries are those of all ranks.
    """

    source: Norm | _AsItIs | _Gated
    linears: Linears | LowBitLinears
    k: int | None = None
    score: torch.Tensor | None = None
    threshold: float | None = None
    every: tuple[torch.Tensor, ...] | None = None
    fused: Norm | _AsItIs | None = None
    swiglu: bool = False
    of_all: LargestOfAll | None = None

    @property
    def weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Weights and biases of the linears, which `fused` wants in the model's own dtype."""
        assert isinstance(self.linears, Linears), "a GPU's operators read no others"
        return self.linears.weights, self.linears.biases

    @property
    def skips(self) -> bool:
        """Whether some columns are not read."""
        return self.k is not None or self.threshold is not None

    def whole(self) -> Site:
        """The same, keeping everything."""
        if not self.skips:
            return self
        every = _columns(self.linears.weights[0], MAX_ROWS) if isinstance(self.linears, Linears) else None
        return replace(self, k=None, threshold=None, score=None, every=every, of_all=None).arranged()

    def rounded(self, form: ColumnFormat, where: str) -> Site:
        """The same over a copy of its linears of few bits, or over those that it has where they are so already."""
        if not isinstance(self.linears, Linears):
            return self
        return replace(self, linears=self.linears.rounded(form, where), every=None).arranged()

    def arranged(self) -> Site:
        """On a GPU, as its operators read it best."""
        if not _on_gpu(self.linears.device):
            return self
        fused = None
        if (self.skips or isinstance(self.linears, LowBitLinears)) and self.of_all is None:
            # Launching one kernel less is worth selecting in every block of a product.
            fused = None if isinstance(self.source, _Gated) else self.source
        return replace(self, every=None, fused=fused)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, adapter: Adapter | None = None
    ) -> torch.Tensor:
        """The linears' outputs side by side, on top of a residual, for x [B, D] that the source starts from.

        The residual goes through an adapter first where there is one, for which columns must be listed.
        """
        along = (None, None) if adapter is None else (adapter.weight, adapter.scale)
        if self.fused is not None and isinstance(self.linears, LowBitLinears):
            kept = self.score, self.k, self.threshold
            return self.linears.selected(x, self.fused.norm, kept, self.swiglu, residual, along)
        if self.fused is not None and (self.threshold is not None or self.fused.carries == (adapter is not None)):
            return self.fused.product(x, self, residual, adapter)
        indices: torch.Tensor | None
        count: torch.Tensor | None = None
        if self.k is not None and self.of_all is not None:
            values, indices, count = self.of_all.own(self.source.every(x), self.k, self.score)
        elif self.k is not None:
            values, indices = self.source.largest(x, self.k, self.score)
        elif self.threshold is not None:
            values, indices, count = self.source.above(x, self.threshold, self.score)
        else:
            values = self.source.every(x)
            if self.every is None and adapter is None:
                return self.linears.every(values, residual)
            indices = None if self.every is None else self.every[len(values) - 1]
        return self.linears.listed(values, indices, residual, along, count)


class Past(NamedTuple):
    """What a layer's attention reads: its part of the caches, which of them each row is of, and the rotary tables."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    cache: torch.Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """One layer's attention: what `torch.ops.larosa.attend` is told beside the `Past`."""

    rotary: bool
    q_gain: torch.Tensor | None
    k_gain: torch.Tensor | None
    eps: float
    scale: float
    window: int

    def __call__(self, qkv: torch.Tensor, position: torch.Tensor, past: Past) -> torch.Tensor:
        """Store keys and values of a position a row, and attend from it: [B, (H + 2 K) d] to [B, H d]."""
        output: torch.Tensor = _ops.attend(
            qkv,
            past.keys,
            past.values,
            position,
            past.cos if self.rotary else None,
            past.sin if self.rotary else None,
            self.q_gain,
            self.k_gain,
            self.eps,
            self.scale,
            self.window,
            past.scales,
            past.cache,
        )
        return output


@dataclass(frozen=True)
class Adapter:
    """What takes the residual stream into another basis (paper, section 4.2).

    Attention and MLP write into that basis by themselves. So on a GPU the weight stands by columns, and the product
    that ends the branch takes it `along`: it is read while that product's entries are still being selected.
    With a scale the weight is int8, for `torch.ops.larosa.adapt`.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    along: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, D] in the basis behind it, by rows."""
        if self.scale is None:
            in_full: torch.Tensor = _ops.linear(x, [self.weight], [None])
            return in_full
        adapted: torch.Tensor = _ops.adapt(x, self.weight, self.scale)
        return adapted


@dataclass(frozen=True)
class DecodeLayer:
    """One decoder layer of a token a row, or one of some ranks' shards of it."""

    h1: Site
    attention: Attention
    h2: Site
    attention_adapter: Adapter | None
    h3: Site
    h4: Site
    residual_adapter: Adapter | None
    ranks: Ranks | None = None

    @property
    def skips(self) -> bool:
        """Whether a site leaves columns out."""
        return any(getattr(self, name).skips for name in SITES)

    def whole(self) -> DecodeLayer:
        """The same, with nothing left out."""
        return self._of({name: getattr(self, name).whole() for name in SITES})

    def rounded(self, form: ColumnFormat, where: str) -> DecodeLayer:
        """The same over a copy of its linears of few bits; `where` names the layer in errors."""
        return self._of({name: getattr(self, name).rounded(form, f"{where}, site {name}") for name in SITES})

    def _of(self, sites: dict[str, Site]) -> DecodeLayer:
        h3, h4 = _mlp(sites["h3"], sites["h4"], _AsItIs())
        return replace(self, h1=sites["h1"], h2=sites["h2"], h3=h3, h4=h4)

    def __call__(self, x: torch.Tensor, position: torch.Tensor, past: Past) -> torch.Tensor:
        """The residual stream [B, D] float32 after this layer."""
        carried = self._carried(x, self.attention_adapter)
        middle = self._joined(self.h2(self.attention(self.h1(x), position, past), *carried))
        carried = self._carried(middle, self.residual_adapter)
        return self._joined(self.h4(self.h3(middle), *carried))

    def _carried(self, x: torch.Tensor, adapter: Adapter | None) -> tuple[torch.Tensor | None, Adapter | None]:
        """The residual of a branch that starts from x, and the adapter that its last product takes along, if any.

        Of ranks, whose branches are summed, each takes part of the residual through its part of the adapter; with no
        adapter the first takes all.
        """
        if adapter is None:
            return (x if self.ranks is None or self.ranks.first else None), None
        if self.ranks is not None:
            x = x[:, adapter_inputs(x.shape[1], self.ranks)].contiguous()
        return (x, adapter) if adapter.along else (adapter(x), None)

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        """What all ranks have added."""
        return x if self.ranks is None else self.ranks.sum(x)


def read_layers(model: Any, architecture: Architecture) -> list[DecodeLayer]:
    """The layers of a dense or sparsified model, over its own weights.

    Linears that are read sparsely are laid out by columns in place, on a GPU all of them, which its kernels
    read faster (those of few bits stand so anyway): their values, and whatever else uses them, stay as they are. Layers
    hold on to the memory itself, so that they stay sound when somebody else lays the same weights out in another way.
    """
    layers, shard = architecture.layers(model), shard_of(model)
    chosen: dict[str, list[Selector]] = {}
    if getattr(model.config, "larosa", None) is not None:
        chosen = selectors(model, architecture)

    # Sites run one after the other, so that one does for all.
    board = torch.zeros(1, dtype=torch.int64, device=architecture.embedding(model).weight.device)

    def site(name: str, index: int, source: Norm | _AsItIs | _Gated) -> Site:
        return _site(architecture.linears(layers[index], name), chosen[name][index] if name in chosen else None, source)

    def decode_layer(index: int, layer: nn.Module) -> DecodeLayer:
        h3 = site("h3", index, norm(architecture.norm(layer, "h3")))
        h3, h4 = _mlp(h3, site("h4", index, _Gated()), _Long(board))
        return DecodeLayer(
            h1=site("h1", index, norm(architecture.norm(layer, "h1"))),
            attention=_attention(model, architecture, layer, index),
            h2=site("h2", index, _AsItIs()),
            attention_adapter=_adapter(layer, "attention_adapter"),
            h3=h3,
            h4=h4,
            residual_adapter=_adapter(layer, "residual_adapter"),
            ranks=None if shard is None else shard.ranks,
        )

    return [decode_layer(index, layer) for index, layer in enumerate(layers)]


def norm(module: Any) -> Norm:
    """An RMSNorm of the model."""
    return Norm(module.weight.data, module.variance_epsilon)


def _site(linears: Sequence[Any], selector: Selector | None, source: Norm | _AsItIs | _Gated) -> Site:
    kept = {} if selector is None else _kept(selector, linears[0].in_features)
    on_gpu = _on_gpu(next(linears[0].parameters()).device)
    read = read_linears(linears, by_columns=bool(kept) or on_gpu)  # a GPU reads all columns faster than all rows
    return Site(source, read, **kept).arranged()


def _mlp(h3: Site, h4: Site, after: _AsItIs) -> tuple[Site, Site]:
    """An MLP's sites: one operator makes silu(gate) * up with h3's product where it is fused, else h4 begins with it.

    Args:
        after: what h4 begins with behind a fused h3 that has not been so before.
    """
    if h3.fused is None:
        source: _AsItIs | _Gated = _Gated()
    else:
        source = h4.source if isinstance(h4.source, _AsItIs) else after
    return replace(h3, swiglu=h3.fused is not None), replace(h4, source=source).arranged()


def _on_gpu(device: torch.device) -> bool:
    """Whether it is a GPU's kernels that read what is there."""
    return device.type != "cpu"


def _columns(weight: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
    """All columns of a weight for each row of one, of two and of up to so many: [B, D] int32."""
    columns = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device).repeat(rows, 1)
    return tuple(columns[: row + 1] for row in range(rows))


def _kept(selector: Selector, width: int) -> dict[str, Any]:
    """What a selector keeps, as fields of a `Site`; none where it keeps everything."""
    if isinstance(selector, TopKOfAll):
        if selector.k == selector.width:
            return {}
        of_all = LargestOfAll(selector.ranks, selector.width)
        return {"k": selector.k, "score": own(selector.score), "of_all": of_all}
    if isinstance(selector, TopK):
        return {} if selector.k == width else {"k": selector.k, "score": own(selector.score)}
    assert isinstance(selector, Threshold), "there are no other selectors"
    return {} if selector.threshold == 0 else {"threshold": selector.threshold, "score": own(selector.score)}


def _attention(model: Any, architecture: Architecture, layer: nn.Module, index: int) -> Attention:
    norms = architecture.query_key_norms(layer)
    return Attention(
        rotary=architecture.uses_rotary(layer),
        q_gain=None if norms is None else norms[0].weight.data,
        k_gain=None if norms is None else norms[1].weight.data,
        eps=0.0 if norms is None else norms[0].variance_epsilon,
        scale=architecture.score_scale(layer),
        window=architecture.window(model.config, index) or 0,
    )


def _adapter(layer: nn.Module, name: str) -> Adapter | None:
    module = getattr(layer, name, None)
    if module is None:
        return None
    along = _on_gpu(module.weight.device)
    lay_out(module, by_columns=along)
    return Adapter(module.weight.data, own(getattr(module, "scale", None)), along)
