"""The sizes of a model's activation sites, and what follows from them for bytes and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from larosa.config import SITES, KeepCounts, Rotation


@dataclass(frozen=True)
class SiteSizes:
    """Sizes of a decoder model, in elements; every layer has the same.

    `width` is the number of activations at a site, `outputs` the number of rows of the matrices that
    read it, so that a site's weights are width x outputs.
    """

    layers: int
    hidden: int
    vocabulary: int
    attention_width: int
    width: dict[str, int]
    outputs: dict[str, int]

    @classmethod
    def of(cls, config: Any) -> SiteSizes:
        """Read the sizes off a model's configuration."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads * head_dim
        keys = config.num_key_value_heads * head_dim
        hidden, intermediate = config.hidden_size, config.intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            vocabulary=config.vocab_size,
            attention_width=queries,
            width={"h1": hidden, "h2": queries, "h3": hidden, "h4": intermediate},
            outputs={"h1": queries + 2 * keys, "h2": hidden, "h3": 2 * intermediate, "h4": hidden},
        )

    def weights(self, site: str) -> int:
        """Weight elements that one layer's site reads when nothing is skipped."""
        return self.width[site] * self.outputs[site]

    @property
    def linear_weights(self) -> int:
        """Weight elements of all decoder layers' linears; embedding and head do not count."""
        return self.layers * sum(self.weights(site) for site in SITES)

    def skipped_weights(self, keep: KeepCounts) -> int:
        """Weight elements that no token reads, over all layers."""
        return sum((self.width[site] - count) * self.outputs[site] for site in SITES for count in keep[site])

    def num_adapters(self, rotation: Rotation) -> int:
        """Residual adapters of a converted model, each [hidden, hidden]."""
        between_layers = self.layers - 1
        return {Rotation.LAYER: between_layers, Rotation.BLOCK: between_layers + self.layers}.get(rotation, 0)

    def adapter_weights(self, rotation: Rotation) -> int:
        """Weight elements that the residual adapters add, over all layers."""
        return self.num_adapters(rotation) * self.hidden**2
