"""What a converted model skips, in weights, bytes and FLOPs, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from larosa.config import SITES, LarosaConfig
from larosa.config.migrations import loading_weights
from larosa.models.families import model_class
from larosa.sparsity.sites import SiteSizes, column_bytes

#: The paper's Table 19 counts a sequence of this many tokens.
_TABLE_19_TOKENS = 2048


@dataclass(frozen=True)
class Sparsity:
    """The three numbers every report states.

    Nominal p, the fraction of the decoder linears' weights that a token does not read, and the same less
    the residual adapters that every token reads in addition, counted by their bytes. With Top-K the
    second is exact for every token; with thresholds it is the mean over the calibration tokens, and what
    other tokens skip has to be measured (`Evaluation.actual_sparsity`).
    """

    nominal: float
    weights: float
    weights_net_of_adapters: float


@dataclass(frozen=True)
class SiteReport:
    """One activation site of one layer; bytes are weight bytes read per token.

    Entries are kept by count (`k`) or by `threshold`, the other being None; then `sparsity` and
    `bytes_sparse` are means over the calibration tokens. A site that the method leaves alone keeps all
    of its `width`. Every weight counts at one site: with CATS those of up and down at `gate`.
    """

    layer: int
    site: str
    width: int
    k: int | None
    threshold: float | None
    sparsity: float
    bytes_dense: int
    bytes_sparse: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` reports. Bytes and FLOPs are per generated token.

    `flops_*` follow the paper's Table 19: two per weight of the decoder linears, the head and the
    adapters, plus attention over a context of 2048, averaged over those 2048 tokens. `flops_converted`
    counts every weight as that table does, `flops_sparse` leaves the skipped ones out.
    `bytes_sparse_total` includes adapters and all score vectors; embedding and head are in neither
    total. `head_bytes` are those of the whole head, `head_bytes_sparse` what a token reads of it. `parameter_bytes` is
    what all parameters take in files and in memory (None for a shape alone, or where it was not asked for),
    `weight_bits` what a weight of the decoder linears does, scales included.
    """

    model_type: str
    larosa: dict[str, Any] | None
    sparsity: Sparsity
    sites: list[SiteReport]
    bytes_dense_total: int
    bytes_sparse_total: int
    adapter_bytes: int
    score_bytes: int
    head_bytes: int
    head_bytes_sparse: int
    parameter_bytes: int | None
    weight_bits: float
    flops_dense: int
    flops_converted: int
    flops_sparse: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token reads of everything but caches, norms and its row of the embedding."""
        return self.bytes_sparse_total + self.head_bytes_sparse

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
    sizes, item = SiteSizes.of(config), element_size(config)
    skipped = sizes.skipped_weights(_dropped_entries(block, sizes))
    adapters = sizes.adapter_bytes(block.rotation, block.layers_per_rotation, block.adapters, item)
    net = skipped - adapters * sizes.linear_weights / sizes.linear_bytes(block.linear_format, item)
    return Sparsity(block.sparsity, skipped / sizes.linear_weights, net / sizes.linear_weights)


def element_size(config: Any) -> int:
    """Bytes of an element of a model's own dtype."""
    dtype = config.dtype or torch.float32
    # transformers leaves a name there once the model has been saved.
    size: int = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    return size


def _dropped_entries(block: LarosaConfig, sizes: SiteSizes) -> dict[str, list[float]]:
    """Entries that each site drops in each layer: exact for counts, expected for thresholds."""
    if block.thresholds is not None:
        shares = block.thresholds.dropped
        return {site: [share * sizes.width[site] for share in shares[site]] for site in shares}
    assert block.keep is not None, "validated"
    return {site: [sizes.width[site] - k for k in block.keep[site]] for site in SITES}


def _parameter_bytes(config: Any, element_size: int) -> int | None:
    """What the parameters of a model take: those without a dtype of their own have elements of so many bytes.

    None for sizes alone (`SiteSizes.of`), of which no model can be made.
    """
    if not isinstance(config, PretrainedConfig):
        return None
    own = torch.get_default_dtype()
    with torch.device("meta"), loading_weights():
        model = model_class(config)(config)
    return sum(p.numel() * (element_size if p.dtype is own else p.element_size()) for p in model.parameters())


def inspect_config(config: Any, *, parameters: bool = True) -> Inspection:
    """Everything that follows from a dense or converted model's configuration.

    Args:
        parameters: whether to say what all of them take, which needs a model without weights.
    """
    block = _block(config)
    sizes = SiteSizes.of(config)
    item = element_size(config)
    dropped = {} if block is None else _dropped_entries(block, sizes)
    form = None if block is None else block.linear_format
    sites = []
    skipped = 0
    for layer in range(sizes.layers):
        for site, matrices in sizes.readers(None if block is None else block.method).items():
            width, column = sizes.width[site], column_bytes(matrices, form, item)
            drops = dropped[site][layer] if site in dropped else 0
            skipped += round(drops * sum(matrices))
            compared = block is not None and block.thresholds is not None and site in dropped
            sites.append(
                SiteReport(
                    layer=layer,
                    site=site,
                    width=width,
                    k=None if compared else width - int(drops),
                    threshold=block.limits[site][layer] if block is not None and compared else None,
                    sparsity=drops / width,
                    bytes_dense=width * column,
                    bytes_sparse=round((width - drops) * column),
                )
            )
    adapters = adapter_bytes = 0
    if block is not None:
        stored = block.rotation, block.layers_per_rotation, block.adapters
        adapters, adapter_bytes = sizes.adapter_weights(*stored), sizes.adapter_bytes(*stored, item)
    scores = block.planes * sizes.score_entries if block is not None and block.score.has_vectors else 0
    of_head = None if block is None or block.thresholds is None else block.thresholds.head
    head_dropped = 0.0
    if block is not None and block.head_format is not None and of_head is not None:
        scores += block.head_format.planes * sizes.hidden
        head_dropped = of_head.dropped
    bytes_dense, bytes_sparse = (sum(getattr(row, name) for row in sites) for name in ("bytes_dense", "bytes_sparse"))
    head = sizes.vocabulary * sizes.hidden
    head_column = column_bytes([sizes.vocabulary], None if block is None else block.head_format, item)
    # Scores and values: two products over the context for each query width, as the paper counts them.
    attention = 4 * _TABLE_19_TOKENS * sizes.attention_width * sizes.layers
    dense = 2 * (sizes.linear_weights + head) + attention
    return Inspection(
        model_type=config.model_type,
        larosa=None if block is None else block.model_dump(mode="json"),
        sparsity=sparsity_of(config),
        sites=sites,
        bytes_dense_total=bytes_dense,
        bytes_sparse_total=bytes_sparse + adapter_bytes + scores * item,
        adapter_bytes=adapter_bytes,
        score_bytes=scores * item,
        head_bytes=sizes.hidden * head_column,
        head_bytes_sparse=round((1 - head_dropped) * sizes.hidden * head_column),
        parameter_bytes=_parameter_bytes(config, item) if parameters else None,
        weight_bits=8 * bytes_dense / sizes.linear_weights,
        flops_dense=dense,
        flops_converted=dense + 2 * adapters,
        flops_sparse=dense + 2 * (adapters - skipped - round(head_dropped * head)),
    )
