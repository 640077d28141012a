"""The dense model, one decoder layer at a time: what every calibration runs on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture


class LayerVisit:
    """One decoder layer on the device, with what the layers before it made of the calibration sequences."""

    def __init__(self, index: int, layer: nn.Module, inputs: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        self.index = index
        self.layer = layer
        #: One [1, length, hidden] for each sequence.
        self.inputs = inputs
        self._kwargs = kwargs
        self._outputs: list[torch.Tensor] | None = None

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer as it is now, over one sequence [1, length, hidden]."""
        output: torch.Tensor = self.layer(hidden, **self._kwargs)
        return output

    def outputs(self) -> list[torch.Tensor]:
        """What the dense layer gives for `inputs`; computed at the first call, under the hooks of that moment."""
        if self._outputs is None:
            self._outputs = [self.run(hidden) for hidden in self.inputs]
        return self._outputs


@torch.no_grad()
def visit_layers(
    model: nn.Module, architecture: Architecture, sequences: torch.Tensor, device: torch.device
) -> Iterator[LayerVisit]:
    """Run `sequences` through the dense model, stopping at each layer.

    Only the residual stream at one layer is held, and only that layer has to be on `device`: it is
    moved there and back, so the model may be larger than the device. A layer may be changed for good
    once its `outputs` have been asked for; the next layer gets those.

    Args:
        model: a dense causal language model in evaluation mode.
        sequences: [number, length] token ids.
        device: where the layers run.
    """
    embedding = architecture.embedding(model)
    hidden = [embedding(ids[None].to(embedding.weight.device)).to(device) for ids in sequences]
    arguments = _layer_arguments(model, architecture, sequences[:1])
    for index, (layer, kwargs) in enumerate(zip(architecture.layers(model), arguments, strict=True)):
        home = next(layer.parameters()).device
        layer.to(device)
        visit = LayerVisit(index, layer, hidden, _to(kwargs, device))
        try:
            yield visit
            hidden = visit.outputs()
        finally:
            layer.to(home)


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps the arguments it is called with."""

    arguments: dict[str, Any]

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.arguments = kwargs
        return hidden


def _layer_arguments(model: nn.Module, architecture: Architecture, sequence: torch.Tensor) -> list[dict[str, Any]]:
    """What the model passes each of its layers beside the hidden state: masks, positions.

    Asking the model keeps sliding windows, position embeddings and the like its own business.
    """
    base = model.get_submodule("model")
    layers = architecture.layers(model)
    recorders = [_Recorder() for _ in layers]
    base.layers = nn.ModuleList(recorders)
    try:
        base(sequence.to(architecture.embedding(model).weight.device), use_cache=False)
    finally:
        base.layers = layers
    return [recorder.arguments for recorder in recorders]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value
