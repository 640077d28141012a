"""Counting zeros at the activation sites while a model runs: what sparsity it really has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

from larosa.architectures import find_architecture
from larosa.config import SITES
from larosa.models import TopK, selectors


@dataclass(frozen=True)
class ZeroFraction:
    """Share of zeros at one site over all tokens and layers."""

    mean: float
    min: float
    max: float


class ZeroCounter:
    """Watches a model's selectors while it is open; a dense model has none and counts nothing."""

    def __init__(self, model: Any) -> None:
        self._handles = []
        self._counts: dict[str, list[torch.Tensor]] = {}
        for site, site_selectors in _selectors(model).items():
            counts = self._counts.setdefault(site, [])
            self._handles += [
                selector.register_forward_hook(
                    lambda _module, _inputs, output, counts=counts: counts.append(
                        (output == 0).sum(-1).flatten() / output.shape[-1]
                    )
                )
                for selector in site_selectors
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def fractions(self) -> dict[str, ZeroFraction] | None:
        """The shares so far, by site; None for a dense model."""
        if not self._counts:
            return None
        result = {}
        for site in SITES:
            shares = torch.cat(self._counts[site]).double()
            result[site] = ZeroFraction(float(shares.mean()), float(shares.min()), float(shares.max()))
        return result


@contextmanager
def sparse_prompts(model: Any) -> Iterator[None]:
    """Sparsify prompts for the time being, also where the model's `prefill` is dense."""
    everything = [selector for site in _selectors(model).values() for selector in site]
    before = [selector.dense_prefill for selector in everything]
    for selector in everything:
        selector.dense_prefill = False
    try:
        yield
    finally:
        for selector, value in zip(everything, before, strict=True):
            selector.dense_prefill = value


def _selectors(model: Any) -> dict[str, list[TopK]]:
    if getattr(model.config, "larosa", None) is None:
        return {}
    return selectors(model, find_architecture(model.config.model_type))
