"""Checkpoints to be measured beside each other."""

from __future__ import annotations

from typing import Any

import torch

from larosa.architectures import Heads
from larosa.checkpoints.io import load, load_config
from larosa.checkpoints.shards import load_shard
from larosa.errors import LarosaError
from larosa.parallel import Ranks
from larosa.sparsity import SiteSizes


def load_alike(
    checkpoints: list[str], dtype: str, device: torch.device, *, needs_dense: bool, ranks: Ranks | None = None
) -> list[tuple[str, Any]]:
    """Load a dense model and what it was converted to: names and models, the dense one first.

    What cannot be compared is refused before any weights are loaded, as far as configurations tell.

    Args:
        checkpoints: folders or hub names, one at least.
        dtype: number format to load them in; `auto` is each checkpoint's own.
        device: where to load them.
        needs_dense: whether one must be dense; more than one never may.
        ranks: of which this process is one, to load its shards; None where it is alone.

    Raises:
        LarosaError: a checkpoint that cannot be loaded, too many or too few dense ones, or models that differ in shape
            or number format.
    """
    configs = {path: load_config(path) for path in checkpoints}
    dense = [path for path in checkpoints if not is_converted(configs[path])]
    if len(dense) > 1 or (needs_dense and not dense):
        mend = "give the one that speedups are over" if needs_dense else "give one at most"
        raise LarosaError(f"{len(dense)} of the checkpoints are dense: {mend}")
    first, *others = [*dense, *(path for path in checkpoints if path not in dense)]
    for path in others:
        if _shape(configs[path]) != _shape(configs[first]):
            raise LarosaError(f"{path} has another shape than {first}: measure them apart")

    def model_of(path: str) -> Any:
        if ranks is not None:
            return load_shard(path, ranks, dtype=dtype).model
        return load(path, dtype=dtype, device=str(device)).model

    models = [(path, model_of(path)) for path in (first, *others)]
    for path, model in models[1:]:
        if model.dtype != models[0][1].dtype:
            formats = [str(each.dtype).removeprefix("torch.") for each in (model, models[0][1])]
            raise LarosaError(f"{path} is in {formats[0]} and {first} in {formats[1]}: give a --dtype")
    return models


def is_converted(config: Any) -> bool:
    """Whether a configuration is of a model that larosa has sparsified."""
    return getattr(config, "larosa", None) is not None


def _shape(config: Any) -> tuple[SiteSizes, Heads]:
    return SiteSizes.of(config), Heads.of(config)
