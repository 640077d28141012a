"""What a converted model skips, in weights, bytes and FLOPs, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from larosa.config import SITES, LarosaConfig
from larosa.sparsity.sites import SiteSizes

#: The paper's Table 19 counts a sequence of this many tokens.
_TABLE_19_TOKENS = 2048


@dataclass(frozen=True)
class Sparsity:
    """The three numbers every report states.

    Nominal p, the fraction of the decoder linears' weights that no token reads, and the same less the
    residual adapters that every token reads in addition.
    """

    nominal: float
    weights: float
    weights_net_of_adapters: float


@dataclass(frozen=True)
class SiteReport:
    """One activation site of one layer; bytes are weight bytes read per token."""

    layer: int
    site: str
    width: int
    k: int
    sparsity: float
    bytes_dense: int
    bytes_sparse: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` reports. Bytes and FLOPs are per generated token.

    `flops_*` follow the paper's Table 19: two per weight of the decoder linears, the head and the
    adapters, plus attention over a context of 2048, averaged over those 2048 tokens. `flops_converted`
    counts every weight as that table does, `flops_sparse` leaves the skipped ones out.
    `bytes_sparse_total` includes adapters; embedding and head are in neither total.
    """

    model_type: str
    larosa: dict[str, Any] | None
    sparsity: Sparsity
    sites: list[SiteReport]
    bytes_dense_total: int
    bytes_sparse_total: int
    adapter_bytes: int
    head_bytes: int
    flops_dense: int
    flops_converted: int
    flops_sparse: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def _block(config: Any) -> LarosaConfig | None:
    block = getattr(config, "larosa", None)
    return None if block is None else LarosaConfig.parse(block)


def sparsity_of(config: Any) -> Sparsity:
    """The sparsity of a model by its configuration; zeros for a dense one."""
    block = _block(config)
    if block is None:
        return Sparsity(0.0, 0.0, 0.0)
    sizes = SiteSizes.of(config)
    skipped = sizes.skipped_weights(block.keep)
    net = skipped - sizes.adapter_weights(block.rotation)
    return Sparsity(block.sparsity, skipped / sizes.linear_weights, net / sizes.linear_weights)


def inspect_config(config: Any) -> Inspection:
    """Everything that follows from a dense or converted model's configuration."""
    block = _block(config)
    sizes = SiteSizes.of(config)
    item = (config.dtype or torch.float32).itemsize
    sites = []
    for layer in range(sizes.layers):
        for site in SITES:
            width, outputs = sizes.width[site], sizes.outputs[site]
            k = width if block is None else block.keep[site][layer]
            sites.append(
                SiteReport(
                    layer=layer,
                    site=site,
                    width=width,
                    k=k,
                    sparsity=1 - k / width,
                    bytes_dense=width * outputs * item,
                    bytes_sparse=k * outputs * item,
                )
            )
    adapters = 0 if block is None else sizes.adapter_weights(block.rotation)
    skipped = 0 if block is None else sizes.skipped_weights(block.keep)
    head = sizes.vocabulary * sizes.hidden
    # Scores and values: two products over the context for each query width, as the paper counts them.
    attention = 4 * _TABLE_19_TOKENS * sizes.attention_width * sizes.layers
    dense = 2 * (sizes.linear_weights + head) + attention
    return Inspection(
        model_type=config.model_type,
        larosa=None if block is None else block.model_dump(mode="json"),
        sparsity=sparsity_of(config),
        sites=sites,
        bytes_dense_total=sizes.linear_weights * item,
        bytes_sparse_total=(sizes.linear_weights - skipped + adapters) * item,
        adapter_bytes=adapters * item,
        head_bytes=head * item,
        flops_dense=dense,
        flops_converted=dense + 2 * adapters,
        flops_sparse=dense + 2 * (adapters - skipped),
    )
