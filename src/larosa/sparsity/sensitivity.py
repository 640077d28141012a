"""Counts for every site of every layer, by what dropping entries there costs.

For a site, the calibration tokens tell how large the j-th smallest of its entries is on average; a measurement with
that site alone sparsified tells how far the model's predictions move for it. Together they estimate the divergence
that the j-th dropped entry costs, and the budget goes where a skipped weight costs least. Fisher scores give the same
without the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from larosa.architectures import Architecture
from larosa.calibration import attached
from larosa.config import HEAD, SITES, KeepCounts, PerSite
from larosa.models import column_norms, head_selector, selectors
from larosa.ops import keep_top_k
from larosa.sparsity.budget import keep_counts
from larosa.sparsity.search import SearchLog
from larosa.sparsity.sites import SiteSizes
from larosa.utils.progress import track

#: The share of entries that a site drops while its own effect is measured. Small shares move the predictions by
#: little more than rounding.
PROBE = 0.5

#: The effects are measured on the first sequences with together at least so many tokens.
TOKENS = 8192

#: What each rank of a site's entries weighs is a mean over so many tokens at least: means settle early.
RANKED_TOKENS = 4096

#: At least this share of a site's entries stays, whatever it costs: the estimate knows nothing of an empty site.
LEAST_KEPT = 1 / 64

#: Weights that are multiplied with at a time, for they may be converted for it.
_PIECE = 2**26

#: A layer and a site.
Place = tuple[int, str]


def head_place(layers: int) -> Place:
    """That of the head's input, behind so many layers."""
    return layers, HEAD


def allocate(
    sparsity: float,
    sizes: SiteSizes,
    entries: Mapping[Place, torch.Tensor],
    divergence: Callable[[KeepCounts], float],
    log: SearchLog,
) -> KeepCounts:
    """The counts that cost the least divergence by estimate, with `sparsity` of all weights skipped.

    Args:
        entries: for each site what its entries weigh, ascending, each rank's mean over the tokens; see
            `sorted_entries`.
        divergence: runs calibration sequences with the given counts.
        log: where the measured effects go.
    """
    everything, probed = keep_counts(0.0, PerSite(), sizes), keep_counts(PROBE, PerSite(), sizes)
    costs = {}
    for place in track(list(entries), "Measuring sensitivity"):
        layer, site = place
        key = (layer, SITES.index(site))
        if key not in log.points:
            counts = {name: list(everything[name]) for name in SITES}
            counts[site][layer] = probed[site][layer]
            log.add(key, divergence(KeepCounts(**counts)))
        dropped = float(entries[place][: sizes.width[site] - probed[site][layer]].sum())
        effect = max(log.points[key], 0.0) / dropped if dropped > 0 else 0.0
        costs[place] = entries[place] * effect
    return cheapest(sparsity, sizes, costs)


def cheapest(sparsity: float, sizes: SiteSizes, costs: Mapping[Place, torch.Tensor]) -> KeepCounts:
    """Drop entries in the order of their cost per skipped weight until `sparsity` of all weights is skipped.

    Each site drops from its cheapest entry on. The budget is met but for less than one column.

    Args:
        costs: for each site what each further dropped entry costs, ascending.
    """
    places = list(costs)
    most = [math.floor(len(costs[place]) * max(1 - LEAST_KEPT, sparsity)) for place in places]
    outputs = torch.tensor([sizes.outputs[site] for _, site in places])
    prices = torch.cat([costs[p][:n].cpu() / sizes.outputs[p[1]] for p, n in zip(places, most, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(places)), torch.tensor(most))
    # Stable, so that equal prices within a site keep their order.
    owners = owners[prices.sort(stable=True).indices]
    budget = round(sparsity * sizes.linear_weights)
    taken = int((outputs[owners].cumsum(0) <= budget).sum())
    dropped = torch.bincount(owners[:taken], minlength=len(places))
    left = budget - int((dropped * outputs).sum())
    full: set[int] = set()  # sites whose next entry did not fit
    for owner in owners[taken:].tolist():
        if left < int(outputs.min()) or len(full) == len(places):
            break
        if owner not in full and int(outputs[owner]) <= left:
            dropped[owner] += 1
            left -= int(outputs[owner])
        else:
            full.add(owner)
    counts = {site: [0] * sizes.layers for site in SITES}
    for (layer, site), drops in zip(places, dropped.tolist(), strict=True):
        counts[site][layer] = sizes.width[site] - drops
    return KeepCounts(**counts)


def fisher_costs(model: Any, architecture: Architecture, run: Callable[[], object]) -> dict[Place, torch.Tensor]:
    """For each site what each further dropped entry costs by its Fisher score, ascending, up to a common factor.

    The scores take the errors of different entries for uncorrelated. At h1, h2 and h3 the rotations nearly see to that,
    but h4 has none, and there what is dropped can write one and the same direction at every token. So every site's
    costs are multiplied by its coherence: with `PROBE` of the entries dropped, the energy of the error in what its
    linears give, as a multiple of what uncorrelated errors would give.

    Args:
        model: sparsified by Fisher scores, keeping every entry.
        run: runs it on the calibration sequences.
    """
    entries, coherences = observed(model, architecture, run, SortedSquares, Coherence)
    return {place: entries[place].mean() * coherences[place].ratio() for place in entries}


def observed(
    model: Any, architecture: Architecture, run: Callable[[], object], *kinds: Callable[..., Any]
) -> list[dict[Place, Any]]:
    """Run a model with observers before every selector: for each kind, made of a selector and its linears, those."""
    observers: list[dict[Place, Any]] = [{} for _ in kinds]
    handles = []
    layers = architecture.layers(model)
    places: list[tuple[Place, Any, list[Any]]] = [
        ((index, site), selector, architecture.linears(layer, site))
        for site, found in selectors(model, architecture).items()
        for index, (layer, selector) in enumerate(zip(layers, found, strict=True))
    ]
    of_head = head_selector(model, architecture)
    if of_head is not None:
        places.append((head_place(len(layers)), of_head, [architecture.head(model)]))
    for place, selector, linears in places:
        for kind, of_kind in zip(kinds, observers, strict=True):
            of_kind[place] = kind(selector, linears)
            handles.append(selector.register_forward_pre_hook(of_kind[place]))
    with attached(*handles), torch.inference_mode():
        run()
    return [dict(sorted(of_kind.items())) for of_kind in observers]


class Coherence:
    """The energy of what dropped entries write, as a multiple of what they would write if they were uncorrelated."""

    def __init__(self, selector: Any, linears: list[Any]) -> None:
        self._selector, self._weights = selector, [linear.weight for linear in linears]
        self._norms: torch.Tensor | None = None
        self._together = self._apart = 0.0

    def __call__(self, _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook."""
        x = self._selector.dense.sparse_tokens(inputs[0])
        dropped = x - keep_top_k(x, x.shape[-1] - round(PROBE * x.shape[-1]), self._selector.score)
        if self._norms is None:  # only now are the weights of a layer on disk in memory
            self._norms = column_norms(self._weights).float()
        self._apart += float((dropped.float() * self._norms).square().sum(dtype=torch.float64))
        for weight in self._weights:
            for rows in weight.split(max(_PIECE // weight.shape[1], 1)):
                self._together += float((dropped @ rows.T.to(dropped)).float().square().sum(dtype=torch.float64))

    def ratio(self) -> float:
        """1 where nothing was dropped."""
        return self._together / self._apart if self._apart > 0 else 1.0


def sorted_entries(model: Any, architecture: Architecture, run: Callable[[], object]) -> dict[Place, torch.Tensor]:
    """For each site the squares of its entries times scores, ascending, each rank's mean over the tokens of `run`.

    Args:
        model: sparsified, keeping every entry.
        run: runs it on the calibration sequences.
    """
    (entries,) = observed(model, architecture, run, SortedSquares)
    return {place: found.mean() for place, found in entries.items()}


class SortedSquares:
    """The squares of a site's entries times scores in ascending order."""

    def __init__(self, selector: Any, _linears: list[Any]) -> None:
        self._selector = selector
        self._sum: torch.Tensor | float = 0.0
        self._tokens = 0

    def __call__(self, _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook."""
        x = self._selector.dense.sparse_tokens(inputs[0]).float()
        if self._selector.score is not None:
            x = x * self._selector.score.float()
        self._sum = self._sum + x.square().sort(-1).values.double().sum(0)
        self._tokens += len(x)

    def mean(self) -> torch.Tensor:
        """Each rank's mean over the tokens, [D] float64."""
        assert isinstance(self._sum, torch.Tensor), "the model has run"
        return (self._sum / self._tokens).cpu()
