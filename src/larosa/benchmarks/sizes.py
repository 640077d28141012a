"""What models of a benchmark take and read, in bytes."""

from __future__ import annotations

from typing import Any

import torch

from larosa.architectures import find_architecture
from larosa.benchmarks.shapes import Layout
from larosa.config import Rotation
from larosa.errors import LarosaError
from larosa.models import selectors
from larosa.parallel import Ranks
from larosa.parallel.shard import adapters_of
from larosa.sparsity import SiteSizes
from larosa.sparsity.report import inspect_config
from larosa.sparsity.sites import column_bytes
from larosa.utils.memory import available_memory, release_memory


def bytes_read(model: Any) -> int:
    """What a token reads of a model's weights, or of those of one rank's shard: a share of linears, and all beside.

    That is adapters, scores and head, of which a share is read in planes; of the embedding it is a row.
    """
    architecture = find_architecture(model.config.model_type)
    report = inspect_config(model.config, parameters=False)
    linears = report.bytes_sparse_total - report.adapter_bytes - report.score_bytes
    head = architecture.head(model)
    whole = list(head.parameters())
    for layer in architecture.layers(model):
        whole += [weight for adapter in adapters_of(layer).values() for weight in adapter.parameters()]
    if report.larosa is not None:
        for of_site in selectors(model, architecture).values():
            whole += [weight for selector in of_site for weight in selector.parameters()]
    skipped = 0.0
    if report.head_bytes_sparse < report.head_bytes:  # a rank has a part of it
        own = sum(weight.nbytes for weight in head.parameters(recurse=False))
        skipped = own * (1 - report.head_bytes_sparse / report.head_bytes)
    return linears + sum(weight.nbytes for weight in whole) - round(skipped)


def weight_bytes(config: Any, dtype: torch.dtype, layout: Layout | None = None) -> int:
    """What the weights of a model of this configuration take, which is sparsified if it has adapters."""
    sizes, item = SiteSizes.of(config), dtype.itemsize
    table = sizes.vocabulary * sizes.hidden * item
    if layout is None:
        return sizes.linear_weights * item + (1 if config.tie_word_embeddings else 2) * table
    form = layout.quantization
    linears = sizes.linear_bytes(None if form is None else form.linear_format, item)
    head = sizes.hidden * column_bytes((sizes.vocabulary,), None if form is None else form.head_format, item)
    return (
        table
        + linears
        + head
        + sizes.adapter_bytes(Rotation.LAYER, layout.layers_per_rotation, layout.stored(dtype), item)
    )


def rank_bytes(config: Any, whole: int, dtype: torch.dtype, ranks: Ranks | None) -> int:
    """What a rank has of weights that take so many bytes: its part of all but the embedding."""
    if ranks is None:
        return whole
    table = config.vocab_size * config.hidden_size * dtype.itemsize
    return table + (whole - table) // ranks.size


#: What makes a shape smaller.
SMALLER_SHAPE = "take fewer --layers or a smaller shape"


def check_room(needed: int, device: torch.device, mend: str = SMALLER_SHAPE) -> None:
    """Refuse models that do not fit.

    Args:
        needed: bytes of all that will be held at once.
        mend: what the message asks for.

    Raises:
        LarosaError: there is less memory; the message says how much is needed.
    """
    release_memory(device)
    free = available_memory(device)
    # A tenth more: a matrix is held twice for a moment while it is laid out by columns, and activations take some.
    if 1.1 * needed > free:
        raise LarosaError(
            f"the models need {1.1 * needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: {mend}"
        )
