"""The sizes of a model's activation sites, and what follows from them for bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from larosa.config import GATE, HEAD, SITES, Method, Rotation
from larosa.formats import AdapterFormat, ColumnFormat


@dataclass(frozen=True)
class SiteSizes:
    """Sizes of a decoder model, in elements; every layer has the same, and `HEAD` is of the model.

    `width` is the number of activations at a site, `matrices` the weights that a zero there skips of each matrix: of
    those that read the site a column or, at the gate, a row of up and a column of down. `outputs` are their sums.
    """

    layers: int
    hidden: int
    vocabulary: int
    attention_width: int
    width: dict[str, int]
    matrices: dict[str, tuple[int, ...]]

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
            width={"h1": hidden, "h2": queries, "h3": hidden, "h4": intermediate, GATE: intermediate, HEAD: hidden},
            matrices={
                "h1": (queries, keys, keys),
                "h2": (hidden,),
                "h3": (intermediate, intermediate),
                "h4": (hidden,),
                GATE: (hidden, hidden),
                HEAD: (config.vocab_size,),
            },
        )

    @cached_property
    def outputs(self) -> dict[str, int]:
        """Weights that a zero at a site skips, in all."""
        return {site: sum(parts) for site, parts in self.matrices.items()}

    def weights(self, site: str) -> int:
        """Weight elements that one layer's site, or the head, reads when nothing is skipped."""
        return self.width[site] * self.outputs[site]

    def linear_bytes(self, form: ColumnFormat | None, element_size: int) -> int:
        """Bytes of the weights of all decoder layers' linears; arguments as for `column_bytes`."""
        return self.layers * sum(
            self.width[site] * column_bytes(self.matrices[site], form, element_size) for site in SITES
        )

    @property
    def linear_weights(self) -> int:
        """Weight elements of all decoder layers' linears; embedding and head do not count."""
        return self.layers * sum(self.weights(site) for site in SITES)

    @property
    def score_entries(self) -> int:
        """Entries of the score vectors of all sites, where there are scores."""
        return self.layers * sum(self.width[site] for site in SITES)

    def readers(self, method: Method | None) -> dict[str, tuple[int, ...]]:
        """Every weight of a layer at one site, the one that decides whether it is read: `matrices` by site.

        With a gate site, up and down belong to it, and h3 is left with the gate's own matrix.
        """
        if method is None or GATE not in method.sites:
            return {site: self.matrices[site] for site in SITES}
        own = {"h3": (self.width[GATE],)}
        return {site: own.get(site, self.matrices[site]) for site in ("h1", "h2", "h3", GATE)}

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
        one = self.hidden * adapters.storage.columns(self.hidden)
        return self.num_adapters(rotation, layers_per_rotation) * one

    def adapter_bytes(
        self, rotation: Rotation, layers_per_rotation: int, adapters: AdapterFormat, element_size: int
    ) -> int:
        """What they take in a model whose weights have elements of so many bytes."""
        one = adapters.storage.stored_bytes(self.hidden, element_size)
        return self.num_adapters(rotation, layers_per_rotation) * one


def column_bytes(matrices: Sequence[int], form: ColumnFormat | None, element_size: int) -> int:
    """Bytes of one column of each of some matrices.

    Args:
        matrices: their numbers of outputs.
        form: that they are stored in; None where their weights are elements of `element_size` bytes.
    """
    if form is None:
        return sum(matrices) * element_size
    return sum(form.column_bytes(outputs) for outputs in matrices)
