"""The merged weights of a sparsified model rounded to few bits, one layer at a time: the last step of a conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.calibration import attached, visit_layers
from larosa.calibration.observers import SecondMoment
from larosa.config import SITES, LarosaConfig
from larosa.formats import ColumnFormat, Quantization, Quantizer
from larosa.models import Threshold, column_norms, note_tie, quantize_head, quantize_layer, selectors, set_planes
from larosa.quantizers.gptq import gptq
from larosa.quantizers.scales import check_scales, grouped, round_to_nearest
from larosa.utils.layer_files import in_memory
from larosa.utils.progress import track

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
        sequences: [number, length] calibration token ids for GPTQ, which sees the whole input of each site in the model
            with the layers before rounded already; else not looked at.
        device: where layers are rounded, one at a time.

    Raises:
        LarosaError: a weight or an activation is NaN or Inf; the message names layer and site.
    """
    linears, head = quantization.linear_format, quantization.head_format
    if linears is not None:
        quantize_linears(model, architecture, linears, quantization.quantizer, sequences, device)
    if head is not None:
        rounded_head = round_to_nearest(architecture.head(model).weight, head, "the language-model head")
        quantize_head(model, architecture, head)
        note_tie(model, architecture)  # the embedding stays what it is
        _fill(architecture.head(model), *rounded_head)
    block = LarosaConfig.parse(model.config.larosa).model_copy(update={"quantization": quantization})
    model.config.larosa = block.model_dump(mode="json")


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
                    selector, linears = found[site][index], architecture.linears(layer, site)
                    assert isinstance(selector, Threshold), "planes go with thresholds"
                    set_planes(selector, _further_scores(selector, linears, form, rounded[site]))
            _store(layer, architecture, form, rounded)


def _further_scores(
    selector: Threshold, linears: list[nn.Linear], form: ColumnFormat, rounded: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Scores of a site's planes after the first, [(planes - 1) D]: what dropping one costs beside what an entry does.

    What a plane leaves has no direction of its own: it counts by its length alone, as a weight of that length does in
    the mean over the site.
    """
    assert selector.score is not None, "planes go with scores"
    weights = column_norms([linear.weight for linear in linears]).square().sum()
    unit = (selector.score.double().square().sum() / weights).sqrt() if weights > 0 else weights
    squares = torch.zeros((form.planes - 1) * len(selector.score), dtype=torch.float64, device=weights.device)
    for linear, (codes, scales) in zip(linears, rounded, strict=True):
        after = len(selector.score)
        columns = form.dequantize(codes[after:], scales[after:], len(linear.weight), torch.float32)
        squares += columns.double().square().sum(1)
    return unit * squares.sqrt()


def _fit(
    model: Any, architecture: Architecture, form: ColumnFormat, sequences: torch.Tensor, device: torch.device
) -> None:
    """Round the decoder's linears by GPTQ, first layer first, with all tokens dense meanwhile.

    What a sparsity drops is the smallest part of an input: it hardly changes the second moment, and without it the same
    codes serve every sparsity.
    """
    layers: Any = architecture.layers(model)
    for layer in layers:
        layer.dense.before = sequences.shape[1]
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
