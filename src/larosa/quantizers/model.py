"""The merged weights of a sparsified model rounded to few bits, one layer at a time: the last step of a conversion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.calibration import attached, head_scores, visit_layers
from larosa.calibration.observers import SecondMoment
from larosa.config import SITES, HeadThreshold, LarosaConfig
from larosa.formats import ColumnFormat, Quantization, Quantizer
from larosa.models import (
    Threshold,
    column_norms,
    head_selector,
    note_tie,
    quantize_head,
    quantize_layer,
    selectors,
    set_planes,
)
from larosa.quantizers.gptq import gptq
from larosa.quantizers.scales import check_scales, grouped, round_to_nearest
from larosa.utils.layer_files import in_memory
from larosa.utils.progress import track

#: Weights made of their codes at a time.
_PIECE = 2**24

#: Codes and scales of each linear that reads a site, by site.
_Rounded = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]


@torch.no_grad()
def quantize(
    model: Any,
    architecture: Architecture,
    quantization: Quantization,
    sequences: torch.Tensor | None,
    device: torch.device,
) -> None:
    """Store a sparsified model's linears and head by few bits, in place.

    Args:
        model: sparsified; its counts or thresholds do not matter.
        sequences: [number, length] calibration token ids: for GPTQ, which sees the whole input of each site in the
            model with the layers before rounded already, and for the scores of a head in planes; else not looked at.
        device: where layers are rounded, one at a time.

    Raises:
        LarosaError: a weight or an activation is NaN or Inf; the message names layer and site.
    """
    linears, head = quantization.linear_format, quantization.head_format
    scores: torch.Tensor | None = None
    if head is not None and head.planes > 1:
        assert sequences is not None, "planes go with scores, which have calibration sequences"
        with _dense(model, architecture, sequences):  # before weights have to be made of codes
            scores = head_scores(model, architecture, sequences, device)
    if linears is not None:
        quantize_linears(model, architecture, linears, quantization.quantizer, sequences, device)
    block = LarosaConfig.parse(model.config.larosa).model_copy(update={"quantization": quantization})
    if head is not None:
        _quantize_head(model, architecture, head, scores)
        if scores is not None:
            assert block.thresholds is not None, "planes go with thresholds"
            keeps_all = block.thresholds.model_copy(update={"head": HeadThreshold()})
            block = block.model_copy(update={"thresholds": keeps_all})
    model.config.larosa = block.model_dump(mode="json")


def _quantize_head(model: Any, architecture: Architecture, form: ColumnFormat, scores: torch.Tensor | None) -> None:
    """Round the head to nearest; `scores` of its input are of a head in planes."""
    weight = architecture.head(model).weight
    rounded = round_to_nearest(weight, form, "the language-model head")
    quantize_head(model, architecture, form)
    note_tie(model, architecture)  # the embedding stays what it is
    _fill(architecture.head(model), *rounded)
    selector = head_selector(model, architecture)
    if selector is not None:
        assert selector.score is not None, "planes go with scores"
        assert scores is not None, "as above"
        further = _further_scores(scores, [weight], form, [rounded])
        selector.score.copy_(torch.cat([scores, further]))


@torch.no_grad()
def quantize_linears(
    model: Any,
    architecture: Architecture,
    form: ColumnFormat,
    quantizer: Quantizer | None,
    sequences: torch.Tensor | None,
    device: torch.device,
) -> None:
    """The linears alone, in any format, of which the configuration says nothing. Arguments are as of `quantize`."""
    if quantizer is Quantizer.GPTQ:
        assert sequences is not None, "GPTQ has calibration sequences"
        _fit(model, architecture, form, sequences, device)
        return
    found = selectors(model, architecture)
    for index, layer in enumerate(track(architecture.layers(model), "Quantizing layers")):
        with in_memory(layer):
            rounded = {
                site: [
                    round_to_nearest(linear.weight, form, _name(index, site))
                    for linear in architecture.linears(layer, site)
                ]
                for site in SITES
            }
            if form.planes > 1:
                for site in SITES:
                    selector = found[site][index]
                    assert isinstance(selector, Threshold), "planes go with thresholds"
                    assert selector.score is not None, "on scores"
                    weights = [linear.weight for linear in architecture.linears(layer, site)]
                    set_planes(selector, _further_scores(selector.score, weights, form, rounded[site]))
            _store(layer, architecture, form, rounded)


def _further_scores(
    score: torch.Tensor,
    weights: list[torch.Tensor],
    form: ColumnFormat,
    rounded: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Scores of a site's planes after the first, [(planes - 1) D]: what dropping one costs beside what an entry does.

    What a plane leaves has no direction of its own: it counts by its length alone, as a weight of that length does in
    the mean over the site.
    """
    energy = column_norms(weights).square().sum()
    unit = (score.double().square().sum() / energy).sqrt() if energy > 0 else energy
    squares = torch.zeros((form.planes - 1) * len(score), dtype=torch.float64, device=energy.device)
    for weight, (codes, scales) in zip(weights, rounded, strict=True):
        step = max(_PIECE // len(weight), 1)
        for at in range(0, len(squares), step):
            columns = slice(len(score) + at, len(score) + at + step)
            left = form.dequantize(codes[columns], scales[columns], len(weight), torch.float32)
            squares[at : at + step] += left.double().square().sum(1)
    return unit * squares.sqrt()


def _fit(
    model: Any, architecture: Architecture, form: ColumnFormat, sequences: torch.Tensor, device: torch.device
) -> None:
    """Round the decoder's linears by GPTQ, first layer first, with all tokens dense meanwhile.

    What a sparsity drops is the smallest part of an input: it hardly changes the second moment, and without it the same
    codes serve every sparsity.
    """
    layers = architecture.layers(model)
    with _dense(model, architecture, sequences):
        visits = visit_layers(model, architecture, sequences, device)
        for visit in track(visits, "Quantizing layers", total=len(layers)):
            moments = {site: SecondMoment(_name(visit.index, site)) for site in SITES}
            with attached(*(architecture.tap(visit.layer, site, moment.see) for site, moment in moments.items())):
                for hidden in visit.inputs:
                    visit.run(hidden)
            rounded = {
                site: _fitted(architecture.linears(visit.layer, site), moment.finish(), form, visit.index)
                for site, moment in moments.items()
            }
            _store(visit.layer, architecture, form, rounded)


@contextmanager
def _dense(model: Any, architecture: Architecture, sequences: torch.Tensor) -> Iterator[None]:
    """Leave all tokens of the sequences dense meanwhile."""
    layers: Any = architecture.layers(model)
    for layer in layers:
        layer.dense.before = sequences.shape[1]
    try:
        yield
    finally:
        for layer in layers:
            layer.dense.before = 0


def _name(layer: int, site: str) -> str:
    return f"layer {layer}, site {site}"


def _fitted(
    linears: list[nn.Linear], moment: torch.Tensor, form: ColumnFormat, layer: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scales of the linears that read a site, by GPTQ."""
    columns = [grouped(linear.weight, form) for linear in linears]
    scales, q = gptq(torch.cat(columns, dim=1), moment, form)
    check_scales(scales, f"layer {layer}")
    groups = [part.shape[1] for part in columns]
    return [
        (form.pack(whole.flatten(1)[:, : len(linear.weight)]), of_linear)
        for linear, of_linear, whole in zip(linears, scales.split(groups, 1), q.split(groups, 1), strict=True)
    ]


def _store(layer: nn.Module, architecture: Architecture, form: ColumnFormat, rounded: _Rounded) -> None:
    quantize_layer(layer, architecture, form)
    for site in SITES:
        for linear, stored in zip(architecture.linears(layer, site), rounded[site], strict=True):
            _fill(linear, *stored)


def _fill(linear: Any, codes: torch.Tensor, scales: torch.Tensor) -> None:
    linear.codes.copy_(codes)
    linear.scales.copy_(scales)
