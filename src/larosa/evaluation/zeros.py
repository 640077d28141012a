"""Counting zeros at the activation sites while a model runs: what sparsity it really has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

from larosa.architectures import find_architecture
from larosa.config import GATE, HEAD, SITES, LarosaConfig
from larosa.models import DenseTokens, Selector, head_selector, selectors
from larosa.parallel import Shard, shard_of, whole_config
from larosa.parallel.shard import SHARDED
from larosa.sparsity import SiteSizes


@dataclass(frozen=True)
class Spread:
    """Mean, extremes and standard deviation of a share."""

    mean: float
    min: float
    max: float
    std: float

    @classmethod
    def of(cls, shares: torch.Tensor) -> Spread:
        """Over all entries of a tensor."""
        shares = shares.double()
        return cls(float(shares.mean()), float(shares.min()), float(shares.max()), float(shares.std(correction=0)))

    def __format__(self, spec: str) -> str:
        mean, least, most = (format(value, spec) for value in (self.mean, self.min, self.max))
        return f"{mean} (min {least}, max {most})"


class ZeroCounter:
    """Watches a converted model while it is open; for a dense model it counts nothing.

    Zeros are counted at every site: behind the selector where the method has one, of the tokens that are not left
    dense, else as the linears find them. At the head they are where it has a selector.
    """

    def __init__(self, model: Any) -> None:
        self._handles: list[Any] = []
        self._zeros: dict[str, list[list[torch.Tensor]]] = {}
        self._shard: Shard | None = None
        self._sparse_sites: tuple[str, ...] = ()
        if getattr(model.config, "larosa", None) is None:
            return
        architecture = find_architecture(model.config.model_type)
        self._shard = shard_of(model)
        self._sizes = SiteSizes.of(whole_config(model))
        self._planes = LarosaConfig.parse(model.config.larosa).planes
        layers = list(architecture.layers(model))
        found = selectors(model, architecture)
        self._sparse_sites = tuple(found)
        for site in dict.fromkeys((*SITES, *found)):
            self._zeros[site] = [[] for _ in layers]
            for index, (layer, counts) in enumerate(zip(layers, self._zeros[site], strict=True)):
                if site in found:
                    self._handles.append(_behind(found[site][index], counts))
                else:
                    self._handles.append(architecture.tap(layer, site, _Count(counts)))
        of_head = head_selector(model, architecture)
        if of_head is not None:
            self._zeros[HEAD] = [[]]
            self._handles.append(_behind(of_head, self._zeros[HEAD][0]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def zeros(self) -> dict[str, torch.Tensor]:
        """Zeros so far, [layers, tokens] int64 for each site, tokens in the order they came; empty for a dense model.

        Beside h1 to h4 there is `gate` where the method sparsifies it, and `head`, which is no layer's, where it is in
        planes. Of several ranks, those of all. With weights in planes an entry counts once for each that it does not
        read.
        """
        # On the CPU, where the layers of a split model meet.
        zeros = {
            site: torch.stack([torch.cat(counts).cpu() for counts in by_layer])
            for site, by_layer in self._zeros.items()
        }
        if self._shard is not None:
            ranks = self._shard.ranks
            for site in (*SHARDED, GATE):
                if site in zeros:
                    zeros[site] = ranks.sum(zeros[site].to(ranks.device)).cpu()
        return zeros

    def fractions(self) -> dict[str, Spread] | None:
        """The shares so far over tokens and layers, by site; None for a dense model."""
        if not self._zeros:
            return None
        entries = {site: self._planes * width for site, width in self._sizes.width.items()}
        return {site: Spread.of(zeros.double() / entries[site]) for site, zeros in self.zeros().items()}

    def skipped(self) -> torch.Tensor:
        """The share of the decoder's weights that each token did not read, [tokens] float64."""
        zeros = self.zeros()
        weights = sum(zeros[site].sum(0) * self._sizes.outputs[site] for site in self._sparse_sites)
        return torch.as_tensor(weights).double() / (self._planes * self._sizes.linear_weights)

    def actual_sparsity(self) -> Spread | None:
        """The spread of `skipped`; None for a dense model."""
        return Spread.of(self.skipped()) if self._sparse_sites else None


class _Count:
    """Appends the number of zeros of each token of an activation [..., D] to a list."""

    def __init__(self, counts: list[torch.Tensor]) -> None:
        self._counts = counts

    def __call__(self, x: torch.Tensor) -> None:
        self._counts.append((x == 0).sum(-1).flatten())


def _behind(selector: Selector, counts: list[torch.Tensor]) -> Any:
    count = _Count(counts)
    return selector.register_forward_hook(lambda _module, _inputs, output: count(selector.dense.sparse_tokens(output)))


@contextmanager
def sparse_prompts(model: Any, dense_before: int = 0) -> Iterator[None]:
    """Sparsify prompts for the time being, also where the model's `prefill` is dense.

    Args:
        dense_before: leave the tokens before this position dense, as if they were a prompt that runs dense.
    """
    layers = _dense_tokens(model)
    saved = [(tokens.prompts, tokens.before) for tokens in layers]
    for tokens in layers:
        tokens.prompts, tokens.before = False, dense_before
    try:
        yield
    finally:
        for tokens, (prompts, before) in zip(layers, saved, strict=True):
            tokens.prompts, tokens.before = prompts, before


def _dense_tokens(model: Any) -> list[DenseTokens]:
    if getattr(model.config, "larosa", None) is None:
        return []
    return [layer.dense for layer in find_architecture(model.config.model_type).layers(model)]  # type: ignore[misc]
