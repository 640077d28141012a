"""The sizes of a model's activation sites, and what follows from them for bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from larosa.config import GATE, SITES, AdapterFormat, Method, Rotation
from larosa.ops.adapter import leading_entries


@dataclass(frozen=True)
class SiteSizes:
    """Sizes of a decoder model, in elements; every layer has the same.

    `width` is the number of activations at a site, `outputs` the number of weights that a zero there
    skips: a column of each matrix that reads the site or, at the gate, a row of up and a column of down.
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
            width={"h1": hidden, "h2": queries, "h3": hidden, "h4": intermediate, GATE: intermediate},
            outputs={
                "h1": queries + 2 * keys,
                "h2": hidden,
                "h3": 2 * intermediate,
                "h4": hidden,
                GATE: 2 * hidden,
            },
        )

    def weights(self, site: str) -> int:
        """Weight elements that one layer's site reads when nothing is skipped."""
        return self.width[site] * self.outputs[site]

    @property
    def linear_weights(self) -> int:
        """Weight elements of all decoder layers' linears; embedding and head do not count."""
        return self.layers * sum(self.weights(site) for site in SITES)

    @property
    def score_entries(self) -> int:
        """Entries of the score vectors of all sites, where there are scores."""
        return self.layers * sum(self.width[site] for site in SITES)

    def readers(self, method: Method | None) -> dict[str, int]:
        """Every weight of a layer at one site, the one that decides whether it is read: outputs by site.

        With a gate site, up and down belong to it, and h3 is left with the gate's own matrix.
        """
        if method is None or GATE not in method.sites:
            return {site: self.outputs[site] for site in SITES}
        gate_rows = self.width[GATE]
        return {"h1": self.outputs["h1"], "h2": self.outputs["h2"], "h3": gate_rows, GATE: self.outputs[GATE]}

    def reach(self, method: Method) -> float:
        """The largest fraction of the decoder's weights that a method could skip."""
        return self.layers * sum(self.weights(site) for site in method.sites) / self.linear_weights

    def skipped_weights(self, dropped: Mapping[str, Sequence[float]]) -> float:
        """Weight elements that are not read where each site drops so many entries in each layer."""
        return sum(sum(counts) * self.outputs[site] for site, counts in dropped.items())

    def num_adapters(self, rotation: Rotation, layers_per_rotation: int = 1) -> int:
        """Residual adapters of a converted model."""
        between_groups = len(rotation.groups(self.layers, layers_per_rotation)) - 1
        return between_groups + (self.layers if rotation is Rotation.BLOCK else 0)

    def adapter_weights(
        self, rotation: Rotation, layers_per_rotation: int = 1, adapters: AdapterFormat = AdapterFormat.FULL
    ) -> int:
        """Weight elements that the residual adapters add, over all layers."""
        width = self.hidden + (leading_entries(self.hidden) if adapters is AdapterFormat.INT8 else 0)
        return self.num_adapters(rotation, layers_per_rotation) * self.hidden * width

    def adapter_bytes(
        self, rotation: Rotation, layers_per_rotation: int, adapters: AdapterFormat, element_size: int
    ) -> int:
        """What they take in a model whose weights have elements of so many bytes."""
        elements = self.adapter_weights(rotation, layers_per_rotation, adapters)
        if adapters is AdapterFormat.FULL:
            return elements * element_size
        return elements + self.num_adapters(rotation, layers_per_rotation) * self.hidden * element_size
