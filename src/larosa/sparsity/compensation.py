"""Weights that make up for what Top-K drops, as far as the kept entries tell it."""

from __future__ import annotations

from typing import Any

import torch

from larosa.architectures import Architecture
from larosa.calibration import attached, visit_layers
from larosa.calibration.observers import not_finite
from larosa.config import SITES, KeepCounts, PerSite
from larosa.models import TopK, selectors, set_keep_counts
from larosa.ops import keep_top_k
from larosa.sparsity.budget import keep_counts
from larosa.sparsity.sites import SiteSizes
from larosa.utils.progress import track


@torch.no_grad()
def compensate(
    model: Any, architecture: Architecture, keep: KeepCounts, sequences: torch.Tensor, device: torch.device
) -> None:
    """Refit every linear of a sparsified model to the entries that its site keeps, and set the counts `keep`.

    W becomes W (I + A)^T, with A the least-squares estimate of what is dropped, d = x - S(x), from what is kept:
    A = (E[s^T s] + r I)^-1 E[s^T d], s = S(x). As a prior for no change, r counts as much as D of the
    calibration tokens. Where nothing is dropped A is 0, and the weights stay as they are.

    Args:
        model: sparsified by Top-K, with prompts sparsified too.
        sequences: [number, length] calibration token ids; layers see what the dense model makes of them.
        device: where layers run, one at a time.

    Raises:
        LarosaError: an activation is NaN or Inf; the message names layer and site.
    """
    sizes = SiteSizes.of(model.config)
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), sizes))
    visits = visit_layers(model, architecture, sequences, device)
    for visit in track(visits, "Compensating layers", total=sizes.layers):
        pairs, handles = {}, []
        for site in SITES:
            selector = selectors(model, architecture)[site][visit.index]
            pairs[site] = _KeptAndDropped(keep[site][visit.index], f"layer {visit.index}, site {site}")
            handles.append(selector.register_forward_pre_hook(pairs[site]))
        with attached(*handles):
            visit.outputs()
        for site in SITES:
            A = pairs[site].estimate()
            for linear in architecture.linears(visit.layer, site):
                wide = linear.weight.double()
                linear.weight.copy_(wide + wide @ A.T)
    set_keep_counts(model, architecture, keep)


class _KeptAndDropped:
    """Moments of the entries that a selector would keep with each other and with those that it would drop."""

    def __init__(self, k: int, where: str) -> None:
        self._k, self._where = k, where
        self._kept: torch.Tensor | float = 0.0
        self._mixed: torch.Tensor | float = 0.0
        self._tokens = 0

    def __call__(self, selector: TopK, inputs: tuple[torch.Tensor, ...]) -> None:
        x = selector.dense.sparse_tokens(inputs[0])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        kept = keep_top_k(x, self._k, selector.score)
        self._kept = self._kept + (kept.T @ kept).double()
        self._mixed = self._mixed + (kept.T @ (x - kept)).double()
        self._tokens += len(x)

    def estimate(self) -> torch.Tensor:
        """A, [D, D] float64: S(x) A estimates x - S(x)."""
        kept, mixed = self._kept, self._mixed
        assert isinstance(kept, torch.Tensor), "the layer has run"
        assert isinstance(mixed, torch.Tensor)
        if not (kept.isfinite().all() and mixed.isfinite().all()):
            raise not_finite(self._where)
        if not mixed.any():  # nothing is dropped, or nothing there
            return mixed
        # D tokens' worth of the mean square of an entry.
        ridge = kept.trace() / self._tokens
        kept.diagonal().add_(ridge)
        return torch.linalg.solve(kept, mixed)
