"""One rank's shard of a model: a model of fewer heads and a narrower MLP, which sums with the others what it adds.

A rank has a part of the key heads with their queries, of the MLP's columns, of the head's vocabulary and of each
adapter's inputs; norms, embedding and scores of h1, h3 and a head in planes are every rank's. What attention and MLP
add to the residual stream is summed over the ranks, so that the stream is the same on all of them, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture, Heads, find_architecture
from larosa.config import KeepCounts, LarosaConfig
from larosa.errors import LarosaError
from larosa.models import (
    Int8Adapter,
    QuantizedLinear,
    TopK,
    adapter_storage,
    model_without_memory,
    set_keep_counts,
    take_memory,
)
from larosa.ops import keep_top_k
from larosa.parallel.ranks import Over, Ranks
from larosa.sparsity import SiteSizes

#: Sites of which each rank has a part.
SHARDED = ("h2", "h4")
#: Sites whose linears give each rank a part of their outputs.
OWN_OUTPUTS = ("h1", "h3")

#: A rank's inputs of an adapter begin at whole pieces of 16 bytes of the residual stream.
_ADAPTER_STEP = 4


@dataclass
class Shard:
    """What makes a model one rank's: it stands in the model's attribute `larosa_shard`."""

    ranks: Ranks
    #: Of the whole model; the model's own configuration is of what is left of it here.
    whole: Any

    def __post_init__(self) -> None:
        # Outputs of few bits are not divided within a group.
        block = getattr(self.whole, "larosa", None)
        form = None if block is None else LarosaConfig.parse(block).head_format
        self._head_step = 1 if form is None else form.group

    @property
    def vocabulary(self) -> slice:
        """Which tokens' logits the rank's head gives."""
        return self.ranks.part(self.whole.vocab_size, self._head_step)

    def logits(self, own: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of which the rank's head has given its own."""
        return self.ranks.gather(own, self.whole.vocab_size, self._head_step)

    def own_block(self, block: dict[str, Any]) -> dict[str, Any]:
        """The `larosa` block of this rank's model, from that of the whole one."""
        config = LarosaConfig.parse(block)
        if config.keep is None:
            return block
        return config.model_copy(update={"keep": self._shares(config.keep)}).model_dump(mode="json")

    def _shares(self, keep: KeepCounts) -> KeepCounts:
        """What the rank keeps of its own entries where all keep so many."""
        width = SiteSizes.of(self.whole).width
        return keep.model_copy(update={s: [self.ranks.share(k, width[s]) for k in keep[s]] for s in SHARDED})

    def set_limits(self, model: Any, block: LarosaConfig) -> None:
        """Describe the whole model by settings with other limits, and let the shard keep as many entries as they say.

        Thresholds are the selectors' already: an entry is above one on whatever rank it is.
        """
        self.whole.larosa = block.model_dump(mode="json")
        model.config.larosa = self.own_block(self.whole.larosa)
        if block.keep is not None:
            counts = block.keep if self.ranks.over is Over.ALL else self._shares(block.keep)
            set_keep_counts(model, find_architecture(model.config.model_type), counts)


def shard_of(model: Any) -> Shard | None:
    """What makes a model one rank's; None for a whole one."""
    return getattr(model, "larosa_shard", None)


def whole_config(model: Any) -> Any:
    """The configuration of the whole model, of which this may be one rank's."""
    shard = shard_of(model)
    return model.config if shard is None else shard.whole


class TopKOfAll(TopK):
    """Top-K over a vector of which each rank has a part: keeps what one process would. Its score is the whole one."""

    def __init__(self, selector: TopK, k: int, width: int, ranks: Ranks) -> None:
        """Take the place of a selector, of the k largest entries of all ranks' `width`."""
        super().__init__(k, selector.dense, None if selector.score is None else selector.score.new_empty(width))
        self.width, self.ranks = width, ranks

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., part] unconditionally."""
        return keep_top_k(self.ranks.gather(x, self.width), self.k, self.score)[..., self.ranks.part(self.width)]


def empty_shard(
    config: Any, dtype: torch.dtype, ranks: Ranks, shared: Mapping[str, nn.Parameter] = MappingProxyType({})
) -> Any:
    """One rank's shard of a dense or converted model, its weights uninitialised, on the rank's device.

    Nothing is allocated that is not the rank's. Once it has been filled, `tie_head` is to follow where the model's head
    is its embedding.

    Args:
        config: of the whole model.
        shared: weights of another shard of this rank; see `larosa.models.take_memory`.

    Raises:
        LarosaError: so many ranks cannot share the model.
    """
    whole = copy.deepcopy(config)
    whole.dtype = dtype
    shard = Shard(ranks, whole)
    model = model_without_memory(_own_config(shard), dtype)
    architecture = find_architecture(config.model_type)
    model.larosa_shard = shard
    _check_groups(model, architecture, shard)
    _cut_head(model, architecture, shard)
    share_selection(model)
    cut_adapters(model)
    take_memory(model, ranks.device, shared)
    for layer in architecture.layers(model):
        for site in SHARDED:
            (linear,) = architecture.linears(layer, site)
            linear.register_forward_hook(_summed(ranks))
    architecture.head(model).register_forward_hook(lambda _module, _inputs, own: shard.logits(own))
    return model


def _own_config(shard: Shard) -> Any:
    config, ranks = copy.deepcopy(shard.whole), shard.ranks
    heads = Heads.of(config)
    if heads.keys % ranks.size:
        able = [str(size) for size in range(1, heads.keys + 1) if heads.keys % size == 0]
        raise LarosaError(
            f"{ranks.size} ranks cannot share {heads.keys} key-value heads evenly: start {', '.join(able)} of them"
        )
    config.head_dim = heads.size
    config.num_attention_heads //= ranks.size
    config.num_key_value_heads //= ranks.size
    columns = ranks.part(config.intermediate_size)
    config.intermediate_size = columns.stop - columns.start
    if config.intermediate_size < 1:
        raise LarosaError(f"{ranks.size} ranks cannot share {shard.whole.intermediate_size} columns of an MLP")
    if getattr(config, "larosa", None) is not None:
        config.larosa = shard.own_block(config.larosa)
    return config


def _check_groups(model: Any, architecture: Architecture, shard: Shard) -> None:
    """Refuse to divide outputs of few bits within a group."""
    ranks, names = shard.ranks, {id(module): name for name, module in model.named_modules()}
    for layer in architecture.layers(model):
        for site in OWN_OUTPUTS:
            for linear in architecture.linears(layer, site):
                outputs = ranks.most(shard.whole.intermediate_size) if site == "h3" else linear.out_features
                if isinstance(linear, QuantizedLinear) and outputs % linear.format.group:
                    raise LarosaError(
                        f"'{names[id(linear)]}' has {outputs} outputs a rank, in groups of {linear.format.group}: "
                        "start fewer ranks, or have smaller groups by --weight-group"
                    )


def _cut_head(model: Any, architecture: Architecture, shard: Shard) -> None:
    rows = shard.vocabulary
    if rows.stop == rows.start:
        raise LarosaError(f"{shard.ranks.size} ranks cannot share a vocabulary of {shard.whole.vocab_size}")

    def cut(head: Any) -> nn.Module:
        if isinstance(head, QuantizedLinear):
            sizes = head.in_features, rows.stop - rows.start
            return QuantizedLinear(head.format, *sizes, selector=head.selector, device=head.codes.device)
        return nn.Linear(head.in_features, rows.stop - rows.start, False, head.weight.device, head.weight.dtype)

    architecture.replace_head(model, cut)


def tie_head(model: Any) -> None:
    """Let the head be this rank's rows of the embedding."""
    architecture, shard = find_architecture(model.config.model_type), shard_of(model)
    assert shard is not None, "it is one rank's"
    embedding, head = architecture.embedding(model).weight, architecture.head(model)
    head.weight = nn.Parameter(embedding.data[shard.vocabulary], requires_grad=False)


def cut_adapters(model: Any) -> None:
    """Leave of a shard's adapters the rank's inputs; their outputs are summed."""
    architecture, shard = find_architecture(model.config.model_type), shard_of(model)
    assert shard is not None, "it is one rank's"
    for layer in architecture.layers(model):
        for adapter in adapters_of(layer).values():
            parts = adapter_parts(adapter, shard.ranks)
            own = torch.cat([adapter.weight.data[part] for part in parts], dim=1)
            adapter.weight = nn.Parameter(own, requires_grad=False)
            inputs = parts[0][1]
            adapter.register_forward_pre_hook(lambda _module, x, inputs=inputs: x[0][..., inputs])
            adapter.register_forward_hook(_summed(shard.ranks))


def share_selection(model: Any) -> None:
    """Let a shard's selectors of h2 and h4 keep the largest of what the ranks select over."""
    architecture, shard = find_architecture(model.config.model_type), shard_of(model)
    assert shard is not None, "it is one rank's"
    block = getattr(shard.whole, "larosa", None)
    keep = None if block is None else LarosaConfig.parse(block).keep
    if shard.ranks.over is Over.OWN or keep is None:
        return
    width = SiteSizes.of(shard.whole).width
    for site in SHARDED:
        for layer, k in zip(architecture.layers(model), keep[site], strict=True):
            linear: Any = architecture.linears(layer, site)[0]
            linear.selector = TopKOfAll(linear.selector, k, width[site], shard.ranks)


def adapters_of(layer: Any) -> dict[str, Any]:
    """The residual adapters of a decoder layer by name, none of a dense one."""
    found = {name: getattr(layer, name, None) for name in ("attention_adapter", "residual_adapter")}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def adapter_parts(adapter: nn.Linear | Int8Adapter, ranks: Ranks) -> list[tuple[slice, slice]]:
    """Where in the whole adapter's weight a rank's inputs stand."""
    whole = len(adapter.weight)
    inputs = adapter_inputs(whole, ranks)
    return [(slice(None), columns) for columns in adapter_storage(adapter).parts(inputs, whole)]


def adapter_inputs(width: int, ranks: Ranks) -> slice:
    """Which entries of a residual stream of this width a rank's adapters read."""
    return ranks.part(width, _ADAPTER_STEP)


def _summed(ranks: Ranks) -> Any:
    """A forward hook that sums outputs over the ranks, rounding once."""

    def join(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        wide = output.to(torch.promote_types(output.dtype, torch.float32)).contiguous()
        return ranks.sum(wide).to(output.dtype)

    return join
