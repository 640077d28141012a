"""The searches of a conversion: what each site of a rotated model keeps (paper, Algorithm 1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from larosa.architectures import Architecture
from larosa.calibration import decoder_outputs
from larosa.config import KeepCounts, LarosaConfig, PerSite, Selection, Thresholds
from larosa.config import Search as SearchKind
from larosa.evaluation.perplexity import RecordedLogits, evaluate_windows
from larosa.models import head_selector, set_keep_counts, set_thresholds
from larosa.sparsity import SiteSizes, keep_counts, prices, sensitivity
from larosa.sparsity.search import SearchLog, grid_search
from larosa.utils.progress import track

#: From a sparsity to counts or thresholds, where one search serves every sparsity; else None.
Limits = Callable[[float], KeepCounts | Thresholds]


def _grid_search(
    model: Any, architecture: Architecture, block: LarosaConfig, sequences: torch.Tensor, log_path: Path | None
) -> Limits | None:
    """Set the counts and coefficients that Algorithm 1 finds, for one sparsity."""

    def perplexity(keep: KeepCounts) -> float:
        set_keep_counts(model, architecture, keep)
        return evaluate_windows(model, sequences, None).perplexity

    sizes = SiteSizes.of(model.config)
    log = SearchLog(log_path, _identity(model, architecture, block, sequences))
    alphas = grid_search(block.sparsity, block.budget, sizes, perplexity, log)
    keep = keep_counts(block.sparsity, alphas, sizes)
    settle(model, architecture, block, alphas, keep)
    return None


def _sensitivity_search(
    model: Any, architecture: Architecture, block: LarosaConfig, sequences: torch.Tensor, log_path: Path | None
) -> Limits | None:
    """Set the counts of each layer and site that cost the least divergence by estimate."""
    sizes = SiteSizes.of(model.config)
    few = sequences[: math.ceil(sensitivity.TOKENS / sequences.shape[1])]
    # The same at every sparsity, so that one log does for all.
    settings = _identity(model, architecture, block.model_copy(update={"sparsity": 0.0}), sequences)
    log = SearchLog(log_path, settings, names=("layer", "site"), measured="kl_divergence")
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), sizes))
    # With every entry kept it is the dense model.
    dense = RecordedLogits(model, few)
    entries = sensitivity.sorted_entries(model, architecture, lambda: evaluate_windows(model, sequences, None))

    def divergence(keep: KeepCounts) -> float:
        set_keep_counts(model, architecture, keep)
        measured = evaluate_windows(model, few, dense).kl_divergence
        assert measured is not None, "there is a reference"
        return measured

    keep = sensitivity.allocate(block.sparsity, sizes, entries, divergence, log)
    settle(model, architecture, block, None, keep)
    return None


def _fisher_search(
    model: Any, architecture: Architecture, block: LarosaConfig, sequences: torch.Tensor, log_path: Path | None
) -> Limits | None:
    """Set the counts or thresholds of each layer and site that cost the least divergence by the scores' estimate."""
    sizes = SiteSizes.of(model.config)
    limits: Limits
    if block.selection is Selection.THRESHOLD:
        limits = priced_thresholds(model, architecture, sequences)
    else:
        set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), sizes))
        costs = sensitivity.fisher_costs(model, architecture, _runs(model, architecture, sequences))
        limits = partial(sensitivity.cheapest, sizes=sizes, costs=costs)
    settle(model, architecture, block, None, limits(block.sparsity))
    return limits


def priced_thresholds(
    model: Any, architecture: Architecture, sequences: torch.Tensor, before: prices.PricedThresholds | None = None
) -> prices.PricedThresholds:
    """The thresholds of a model that has Fisher scores, for any sparsity; see `PricedThresholds`."""
    return prices.PricedThresholds(model, architecture, _runs(model, architecture, sequences), before)


def _runs(model: Any, architecture: Architecture, sequences: torch.Tensor) -> Callable[[], None]:
    """What runs a model over as many sequences as ranks of entries settle with."""
    few = sequences[: math.ceil(sensitivity.RANKED_TOKENS / sequences.shape[1])]

    def run() -> None:
        of_head = head_selector(model, architecture)
        for hidden in track(decoder_outputs(model, architecture, few), "Costs of entries", total=len(few)):
            if of_head is not None:
                of_head(hidden)  # as the head would; nobody wants its logits

    return run


def _identity(model: Any, architecture: Architecture, block: LarosaConfig, sequences: torch.Tensor) -> dict[str, Any]:
    """What the points of a search depend on."""
    settings = block.model_dump(mode="json", exclude={"alphas", "keep", "thresholds"})
    settings["sequences"] = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    head = architecture.head(model).weight
    settings["model"] = hashlib.sha256(head[:64].float().cpu().numpy().tobytes()).hexdigest()
    return settings


def settle(
    model: Any,
    architecture: Architecture,
    block: LarosaConfig,
    alphas: PerSite | None,
    limits: KeepCounts | Thresholds,
) -> None:
    """Make coefficients, and counts or thresholds, the model's own."""
    if isinstance(limits, Thresholds):
        set_thresholds(model, architecture, limits)
        found = block.model_copy(update={"alphas": alphas, "thresholds": limits})
    else:
        set_keep_counts(model, architecture, limits)
        found = block.model_copy(update={"alphas": alphas, "keep": limits})
    model.config.larosa = found.model_dump(mode="json")


#: What finds a model's counts, where the settings ask for a search; see `Limits` for what it returns.
SEARCHES = {
    SearchKind.GRID: _grid_search,
    SearchKind.SENSITIVITY: _sensitivity_search,
    SearchKind.FISHER: _fisher_search,
}
