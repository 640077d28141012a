"""The conversion: calibrate, rotate, merge, sparsify, search (paper, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture, Heads, find_architecture
from larosa.architectures.context import context_length
from larosa.calibration import LayerMoments, calibration_sequences, layer_fisher, layer_statistics
from larosa.config import (
    CalibrationRecord,
    Compensation,
    Covariance,
    KeepCounts,
    LarosaConfig,
    Method,
    PerSite,
    Rotation,
    RotationObjective,
    Score,
    Selection,
    Settings,
    Thresholds,
)
from larosa.config import Search as SearchKind
from larosa.conversion.options import ConversionOptions, ConversionSettings
from larosa.conversion.searches import SEARCHES, Limits, priced_thresholds, settle
from larosa.errors import LarosaError
from larosa.formats import AdapterFormat, Quantization
from larosa.models import Family, family_of, set_adapter, set_scores
from larosa.models.plain import check_changeable, check_plain
from larosa.quantizers import quantize
from larosa.rotation import (
    Adapters,
    LayerBases,
    LayerFrames,
    UnitFisher,
    connect,
    merge_bases,
    output_aware,
    principal_basis,
    random_basis,
    reader_gram,
)
from larosa.sparsity import SiteSizes, keep_counts
from larosa.sparsity.compensation import compensate
from larosa.sparsity.greedy import GreedyAllocation
from larosa.sparsity.prices import PricedThresholds, no_thresholds
from larosa.sparsity.thresholds import Allocation, calibrate_thresholds, uniform_shares
from larosa.utils.finite import check_converted, check_weights
from larosa.utils.layer_files import in_memory
from larosa.utils.options import takes
from larosa.utils.progress import track
from larosa.version import __version__


@takes(ConversionOptions)
def convert(
    model: Any,
    tokenizer: Any = None,
    *,
    device: torch.device | str | None = None,
    search_log: Path | None = None,
    **options: Any,
) -> Any:
    """Sparsify a dense causal language model in place and return it.

    The model's weights are rotated, and its class and configuration become the family's sparsified ones; after an
    error the model must not be used any more. `hidden_states[l]` of the result is in layer l's rotated basis. The
    methods that LaRoSA is compared with rotate nothing and change no weight.

    Args:
        model: a supported dense model (Llama, Mistral, Qwen2, Qwen3, SmolLM3), in any float dtype.
        tokenizer: needed for calibration text; not for `calibration="self"`.
        device: where layers are calibrated and merged, one at a time; None is where the embedding is.
        search_log: file to keep the search's points in, so that it can be resumed.
        options: by the names of `larosa.conversion.ConversionOptions`, as `sparsity=0.5`.

    Returns:
        `model`, now a `Larosa...ForCausalLM`.

    Raises:
        LarosaError: unsupported model, bad option, a sparsity beyond the method's reach, unusable
            calibration text, NaN or Inf.
    """
    check_plain(model)
    settings = ConversionOptions(**options).complete(context_length(model.config))
    return sparsify(model, tokenizer, settings, device=device, search_log=search_log).model


@dataclass(frozen=True)
class Sparsified:
    """A converted model, and how its sparsity can still be changed.

    `limits` gives the counts or thresholds of any sparsity; None where those, the weights or coefficients are of one
    alone. `sequences` are the calibration tokens [number, length], None where nothing was calibrated; layers were
    worked on at `device`.
    """

    model: Any
    architecture: Architecture
    limits: Limits | None
    sequences: torch.Tensor | None
    device: torch.device
    #: What `limits` has given: thresholds are calibrated anew for each sparsity, and searches come back to some.
    _found: dict[float, KeepCounts | Thresholds] = field(default_factory=dict, repr=False, compare=False)

    def set_sparsity(self, sparsity: float) -> None:
        """Let the model skip another fraction of its weights: its counts or thresholds change, nothing else.

        Raises:
            LarosaError: what was converted holds at one sparsity alone.
        """
        block = LarosaConfig.parse(self.model.config.larosa)
        if self.limits is None:
            raise LarosaError(
                f"method {block.method}, search {block.search} and compensation {block.compensation} are of one "
                "sparsity: convert for each anew, or choose --search fisher or none"
            )
        if sparsity not in self._found:
            self._found[sparsity] = self.limits(sparsity)
        changed = block.model_copy(update={"sparsity": sparsity})
        settle(self.model, self.architecture, changed, block.alphas, self._found[sparsity])

    def stored(self, quantization: Quantization) -> Sparsified:
        """A copy of a model that is stored in full, stored by few bits.

        Its counts or thresholds are those of the model in full, for every sparsity, which has to stay as it is. In
        planes it has thresholds of its own, and a sparsity is of all of them.
        """
        copied = copy.deepcopy(self.model)
        quantize(copied, self.architecture, quantization, self.sequences, self.device)
        check_converted(copied, self.sequences)
        if quantization.weights.planes == 1:
            return replace(self, model=copied)
        limits = _of_planes(copied, self.architecture, self.limits, self.sequences)
        return replace(self, model=copied, limits=limits, _found={})


def sparsify(
    model: Any,
    tokenizer: Any,
    settings: ConversionSettings,
    *,
    device: torch.device | str | None = None,
    search_log: Path | None = None,
    sequences: torch.Tensor | None = None,
) -> Sparsified:
    """`convert` with complete settings, for whoever wants several sparsities of one calibration.

    Args:
        sequences: calibration tokens [number, length] that were drawn before as the settings say; None draws them.
    """
    check_plain(model)
    check_changeable(model)
    if str(model.config.model_type).startswith("larosa_"):
        raise LarosaError("the model is converted already; convert the dense one")
    architecture = find_architecture(model.config.model_type)
    sizes = SiteSizes.of(model.config)
    check_reach(settings, architecture, sizes)
    model.eval().requires_grad_(False)
    check_weights(model)
    if settings.calibration is None:
        sequences = None
    elif sequences is None:
        sequences = _calibration_sequences(model, tokenizer, settings.calibration)
    where = torch.device(device) if device else architecture.embedding(model).weight.device
    dtype = architecture.embedding(model).weight.dtype
    selection = _selection(model, architecture, settings, sizes, sequences, where)
    recorded = {name: getattr(settings, name) for name in Settings.model_fields}
    recorded["quantization"] = None  # until it is done, last of all
    block = LarosaConfig(
        **recorded,
        larosa_version=__version__,
        adapters=settings.adapters or AdapterFormat.usual(dtype),
        **selection,
    )

    if settings.rotation.rotates:
        _untie(model, architecture)
    fisher = _fisher(model, architecture, settings, sequences, where)
    bases = _bases(model, architecture, settings, sequences, where, fisher)
    frames = connect(bases, block.adapters, dtype)
    scores: list[dict[str, torch.Tensor]] | None = None
    if settings.score is Score.FISHER:
        scores = []
        frames = _scored(frames, fisher, scores)
    layers = len(architecture.layers(model))
    stored = merge_bases(model, architecture, track(frames, "Merging bases", total=layers))
    _adopt(model, family_of(architecture), block, stored, scores)
    limits: Limits | None = None
    planes = settings.quantization is not None and settings.quantization.weights.planes > 1
    if settings.search in SEARCHES:
        assert sequences is not None, "a search has calibration sequences"
        # Planes have thresholds of their own: before there are any, those of no sparsity, which take no passes.
        searched = block.model_copy(update={"sparsity": 0.0}) if planes else block
        limits = SEARCHES[settings.search](model, architecture, searched, sequences, search_log)
    elif settings.selection is Selection.TOP_K:
        limits = partial(keep_counts, alphas=settings.alphas or PerSite(), sizes=sizes)
    if settings.compensation is Compensation.LINEAR:
        assert sequences is not None, "compensation has calibration sequences"
        keep = LarosaConfig.parse(model.config.larosa).keep
        assert keep is not None, "the method counts"
        compensate(model, architecture, keep, sequences, where)
        limits = None
    if settings.quantization is not None:  # last: what it rounds are the weights that the model runs by
        quantize(model, architecture, settings.quantization, sequences, where)
        if planes:
            limits = _of_planes(model, architecture, limits, sequences)
            stored_block = LarosaConfig.parse(model.config.larosa).model_copy(update={"sparsity": block.sparsity})
            settle(model, architecture, stored_block, None, limits(block.sparsity))
    check_converted(model, sequences)
    return Sparsified(model, architecture, limits, sequences, where)


def _of_planes(
    model: Any, architecture: Architecture, limits: Limits | None, sequences: torch.Tensor | None
) -> PricedThresholds:
    """What gives a model that is stored in planes its thresholds; `limits` gave them to it before."""
    assert isinstance(limits, PricedThresholds), "planes go with thresholds on Fisher scores"
    assert sequences is not None, "thresholds have calibration sequences"
    return priced_thresholds(model, architecture, sequences, limits)


def check_reach(settings: ConversionSettings, architecture: Architecture, sizes: SiteSizes) -> None:
    """Refuse a method that does not apply to this model, or a sparsity that it cannot give it.

    Raises:
        LarosaError: the message says why, or what the method can give.
    """
    for site in settings.method.sites:
        architecture.check_site(site)
    if settings.method in (Method.TEAL, Method.CATS):
        uniform_shares(settings.method, settings.sparsity, sizes)
    else:
        keep_counts(settings.sparsity, settings.alphas or PerSite(), sizes)


def _selection(
    model: Any,
    architecture: Architecture,
    settings: ConversionSettings,
    sizes: SiteSizes,
    sequences: torch.Tensor | None,
    device: torch.device,
) -> dict[str, Any]:
    """What decides which entries the method keeps, as a key of the configuration block."""
    if settings.selection is Selection.TOP_K:
        return {"keep": keep_counts(settings.sparsity, settings.alphas or PerSite(), sizes)}
    if settings.search is SearchKind.FISHER:
        return {"thresholds": no_thresholds(sizes)}  # until the search has run
    assert sequences is not None, "thresholds are calibrated"
    sites = settings.method.sites
    shares, first = uniform_shares(settings.method, settings.sparsity, sizes), int(settings.dense_first_token)
    allocate: Allocation = lambda visit, magnitudes: shares  # noqa: E731
    if settings.search is SearchKind.GREEDY:
        allocate = GreedyAllocation(
            architecture, settings.sparsity, {site: sizes.weights(site) for site in sites}, first
        )
    return {"thresholds": calibrate_thresholds(model, architecture, sequences, device, sites, allocate, first)}


def _calibration_sequences(model: Any, tokenizer: Any, record: CalibrationRecord) -> torch.Tensor:
    longest = context_length(model.config)
    if record.sequence_length > longest:
        raise LarosaError(f"--sequence-length {record.sequence_length} is over the model's context of {longest}")
    if tokenizer is None and record.source != "self":
        raise LarosaError(f"calibration source '{record.source}' is text and needs a tokenizer")
    return calibration_sequences(
        record.source,
        model,
        tokenizer,
        num_sequences=record.num_sequences,
        sequence_length=record.sequence_length,
        seed=record.seed,
    )


def _untie(model: Any, architecture: Architecture) -> None:
    """Give the head a weight of its own: rotation makes it differ from the embedding."""
    head, embedding = architecture.head(model), architecture.embedding(model)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def _fisher(
    model: Any,
    architecture: Architecture,
    settings: ConversionSettings,
    sequences: torch.Tensor | None,
    device: torch.device,
) -> list[UnitFisher]:
    """Each layer's Fisher information where the settings need it, else an empty list."""
    if not settings.needs_fisher:
        return []
    assert sequences is not None, "gradients have sequences"
    heads = Heads.of(model.config)
    first, rotated = int(settings.dense_first_token), settings.rotation.rotates
    found = layer_fisher(model, architecture, sequences, device, settings.seed, first, rotated)
    return [
        UnitFisher(layer, architecture, partial(found.__getitem__, index), heads, device)
        for index, layer in enumerate(architecture.layers(model))
    ]


def _scored(
    frames: Iterable[LayerFrames], fisher: list[UnitFisher], scores: list[dict[str, torch.Tensor]]
) -> Iterator[LayerFrames]:
    """Pass the bases on, and note the scores of the sites in them."""
    for layer, found in zip(frames, fisher, strict=True):
        scores.append(found.scores(layer))
        yield layer


def _bases(
    model: Any,
    architecture: Architecture,
    settings: ConversionSettings,
    sequences: torch.Tensor | None,
    device: torch.device,
    fisher: list[UnitFisher],
) -> Iterator[LayerBases]:
    """Each layer's bases, first layer first; a layer may be merged as soon as its bases are out."""
    layers = architecture.layers(model)
    given: torch.Tensor | None = None
    if settings.rotation is Rotation.RANDOM:
        given = random_basis(model.config.hidden_size, settings.seed).to(device)
    if not (settings.rotation.is_calibrated or settings.value_rotation):
        yield from (LayerBases(given, given) for _ in layers)
        return
    if fisher and not settings.rotation.is_calibrated:  # its pass has seen the values already
        for each in fisher:
            objective = each if settings.rotation_objective is RotationObjective.FISHER else None
            yield LayerBases(given, given, _value_basis(each.value_moments, objective))
        return
    assert sequences is not None, "calibrated rotations have sequences"
    group_ends = {group[-1] for group in settings.rotation.groups(len(layers), settings.layers_per_rotation)}
    total: list[torch.Tensor] = []
    values: list[torch.Tensor | None] = []
    statistics = layer_statistics(model, architecture, sequences, device, int(settings.dense_first_token))
    for index, (layer, found) in enumerate(zip(layers, statistics, strict=True)):
        of_layer = fisher[index] if settings.rotation_objective is RotationObjective.FISHER else None
        values.append(_value_basis(found.values, of_layer) if settings.value_rotation else None)
        if settings.rotation.is_calibrated:
            matrices = _concentrated(layer, architecture, settings, found.moments, of_layer)
            total = [a + b for a, b in zip(total, matrices, strict=True)] if total else matrices
        if index in group_ends:
            bases: list[torch.Tensor | None] = [principal_basis(matrix) for matrix in total] or [given]
            yield from (LayerBases(bases[0], bases[-1], of_heads) for of_heads in values)
            total, values = [], []


def _value_basis(moments: torch.Tensor, fisher: UnitFisher | None) -> torch.Tensor:
    return principal_basis(moments if fisher is None else output_aware(moments, fisher.values))


def _concentrated(
    layer: nn.Module,
    architecture: Architecture,
    settings: ConversionSettings,
    moments: LayerMoments,
    fisher: UnitFisher | None,
) -> list[torch.Tensor]:
    """The matrix whose principal basis a layer works in; at level `block` one for h1 and one for h3."""
    C = [moments.h1, moments.h3]
    if settings.rotation is not Rotation.BLOCK:
        # Both are of RMSNorm outputs, so both have trace D and the mean needs no weights.
        chosen = {Covariance.H1: C[0], Covariance.H3: C[1]}.get(settings.covariance or Covariance.JOINT)
        C = [(C[0] + C[1]) / 2 if chosen is None else chosen]
    if settings.rotation_objective is RotationObjective.INPUTS:
        return C
    grams = [
        reader_gram(
            [linear.weight for linear in architecture.linears(layer, site)], architecture.norm(layer, site).weight
        )
        if fisher is None
        else fisher.unit(site)
        for site in ("h1", "h3")
    ]
    if settings.rotation is not Rotation.BLOCK:
        grams = [grams[0] + grams[1]]
    return [output_aware(*pair) for pair in zip(C, grams, strict=True)]


@torch.no_grad()
def _adopt(
    model: Any,
    family: Family,
    block: LarosaConfig,
    adapters: list[Adapters],
    scores: list[dict[str, torch.Tensor]] | None,
) -> None:
    """Give the rotated model its sparsified class, its adapters and its scores."""
    family.adopt(model, block)
    for layer, layer_adapters in zip(family.architecture.layers(model), adapters, strict=True):
        found = {name: getattr(layer_adapters, name) for name in ("attention", "residual")}
        if any(adapter is not None for adapter in found.values()):
            with in_memory(layer):
                for name, adapter in found.items():
                    if adapter is not None:
                        set_adapter(getattr(layer, f"{name}_adapter"), adapter)
    set_scores(model, family.architecture, scores)
    model.eval().requires_grad_(False)
