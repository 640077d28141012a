"""The dense model, one decoder layer at a time: what every calibration runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.calibration.observers import not_finite
from larosa.calibration.precision import float32_arithmetic
from larosa.calibration.shelf import Shelf
from larosa.utils.layer_files import in_memory, is_streamed
from larosa.utils.progress import track


class LayerVisit:
    """One decoder layer on the device, with what the layers before it made of the calibration sequences."""

    def __init__(self, index: int, layer: nn.Module, inputs: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        self.index = index
        self.layer = layer
        #: One [1, length, hidden] for each sequence.
        self.inputs = inputs
        self.kwargs = kwargs
        self._outputs: list[torch.Tensor] | None = None

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer as it is now, over one sequence [1, length, hidden]."""
        with float32_arithmetic(self.layer, hidden.device):
            output: torch.Tensor = self.layer(hidden, **self.kwargs)
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
    moved there and back, or read from disk and kept there again, so the model may be larger than the device. A layer
    may be changed for good once its `outputs` have been asked for; the next layer gets those.

    Args:
        model: a dense causal language model in evaluation mode.
        sequences: [number, length] token ids.
        device: where the layers run.
    """
    embedding = architecture.embedding(model)
    with float32_arithmetic(embedding, device):
        hidden = [embedding(ids[None].to(embedding.weight.device)).to(device) for ids in sequences]
    arguments = _layer_arguments(model, architecture, sequences[:1], device)
    for index, (layer, kwargs) in enumerate(zip(architecture.layers(model), arguments, strict=True)):
        visit = LayerVisit(index, layer, hidden, _to(kwargs, device))
        with in_memory(layer, device):
            yield visit
            hidden = visit.outputs()


class BackwardVisit(LayerVisit):
    """One decoder layer on the device, with the gradients of a loss with respect to its outputs."""

    def __init__(self, *visit: Any, gradients: list[torch.Tensor]) -> None:
        super().__init__(*visit)
        self._gradients = gradients

    def outputs(self) -> list[torch.Tensor]:
        """The gradients with respect to `inputs`; computed at the first call, under the hooks of that moment."""
        if self._outputs is None:
            self._outputs = [self._back(*pair) for pair in zip(self.inputs, self._gradients, strict=True)]
        return self._outputs

    def _back(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            hidden = hidden.detach().to(gradient.device).requires_grad_()
            output = self.run(hidden)
        return torch.autograd.grad(output, hidden, gradient)[0]


@torch.no_grad()
def visit_layers_backwards(
    model: nn.Module,
    architecture: Architecture,
    sequences: torch.Tensor,
    device: torch.device,
    loss_gradient: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[BackwardVisit]:
    """Run `sequences` through the dense model, then back from its last layer to the first, stopping at each.

    The residual stream before every layer is kept on disk in the model's dtype, and each layer runs again
    to go back through it, so that only one layer's activations are ever held.

    Args:
        loss_gradient: from the last layer's output for a sequence, [1, length, hidden], to the gradient of a
            loss with respect to it, on the same device. Other arguments are as for `visit_layers`.

    Raises:
        LarosaError: what a layer gives is NaN or Inf, and the message names it; or the disk is full.
    """
    passed: list[tuple[int, nn.Module, dict[str, Any]]] = []
    streams = Shelf()
    gradients: list[torch.Tensor] = []
    visits = visit_layers(model, architecture, sequences, device)
    for visit in track(visits, "Activations", total=len(architecture.layers(model))):
        passed.append((visit.index, visit.layer, visit.kwargs))
        streams.append({str(number): hidden for number, hidden in enumerate(visit.inputs)})
        if not all(bool(hidden.isfinite().all()) for hidden in visit.outputs()):
            raise not_finite(f"layer {visit.index}")
        if len(passed) == len(architecture.layers(model)):
            gradients = [loss_gradient(hidden) for hidden in visit.outputs()]
    while passed:
        index, layer, kwargs = passed.pop()
        stream = streams.pop()
        inputs = [stream[str(number)] for number in range(len(stream))]
        back = BackwardVisit(index, layer, inputs, kwargs, gradients=gradients)
        with in_memory(layer, device):
            yield back
            gradients = back.outputs()


def decoder_outputs(model: Any, architecture: Architecture, sequences: torch.Tensor) -> Iterator[torch.Tensor]:
    """What the head reads of each sequence, [1, length, hidden]; in float32 where 16 bits are computed so.

    One sequence after the other goes through the model, or, where the layers are on disk, all through one layer after
    the other: each is read once.

    Args:
        model: dense or converted, in evaluation mode.
        sequences: [number, length] token ids.
    """
    decoder, device = architecture.decoder(model), architecture.embedding(model).weight.device
    if not is_streamed(model):
        for ids in sequences:
            with float32_arithmetic(decoder, device):
                output = decoder(ids[None].to(device), use_cache=False)
            yield output.last_hidden_state
        return
    hidden: list[torch.Tensor] = []
    visits = visit_layers(model, architecture, sequences, device)
    for visit in track(visits, "Layers", total=len(architecture.layers(model))):
        hidden = visit.outputs()
    yield from (architecture.final_norm(model)(each) for each in hidden)


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps the arguments it is called with."""

    arguments: dict[str, Any]

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.arguments = kwargs
        return hidden


def _layer_arguments(
    model: nn.Module, architecture: Architecture, sequence: torch.Tensor, device: torch.device
) -> list[dict[str, Any]]:
    """What the model passes each of its layers beside the hidden state: masks, positions.

    Asking the model keeps sliding windows, position embeddings and the like its own business.
    """
    recorders = [_Recorder() for _ in architecture.layers(model)]
    embedding = architecture.embedding(model)
    with architecture.other_layers(model, recorders), float32_arithmetic(embedding, device):
        architecture.decoder(model)(sequence.to(embedding.weight.device), use_cache=False)
    return [recorder.arguments for recorder in recorders]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value
