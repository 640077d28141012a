"""Second moments of the rotated sites' activations, one decoder layer at a time (paper, equation 7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.errors import LarosaError


class LayerMoments(NamedTuple):
    """mean(x^T x) over all calibration tokens, not centred, [D, D] float64.

    x is the RMSNorm's output before its gain: the gain is folded into the weights, so this is what
    gets rotated.
    """

    h1: torch.Tensor
    h3: torch.Tensor


@torch.no_grad()
def layer_second_moments(
    model: nn.Module, architecture: Architecture, sequences: torch.Tensor, device: torch.device
) -> Iterator[LayerMoments]:
    """Run `sequences` through the dense model and yield each layer's moments as soon as it has run.

    Only the residual stream at one layer is held, and only that layer has to be on `device`: it is
    moved there and back, so the model may be larger than the device. A layer may be changed by the
    caller once its moments have been yielded.

    Args:
        model: a dense causal language model in evaluation mode.
        sequences: [number, length] token ids.
        device: where the layers run.

    Raises:
        LarosaError: an activation is NaN or Inf; the message names layer and site.
    """
    layers = architecture.layers(model)
    embedding = architecture.embedding(model)
    hidden = [embedding(ids[None].to(embedding.weight.device)).to(device) for ids in sequences]
    arguments = _layer_arguments(model, architecture, sequences[:1])
    for index, (layer, kwargs) in enumerate(zip(layers, arguments, strict=True)):
        home = next(layer.parameters()).device
        layer.to(device)
        moments = {
            site: _SecondMoment(architecture, architecture.norm(layer, site), f"layer {index}, site {site}")
            for site in LayerMoments._fields
        }
        kwargs = _to(kwargs, device)
        for position, x in enumerate(hidden):
            hidden[position] = layer(x, **kwargs)
        yield LayerMoments(**{site: moment.finish() for site, moment in moments.items()})
        layer.to(home)


class _SecondMoment:
    """Accumulates the second moment of one norm's unit-gain output while the model runs."""

    def __init__(self, architecture: Architecture, norm: nn.Module, where: str) -> None:
        self._architecture = architecture
        self._where = where
        self._sum: torch.Tensor | None = None
        self._tokens = 0
        self._hook = norm.register_forward_hook(self._add)

    def _add(self, norm: nn.Module, inputs: tuple[torch.Tensor], output: Any) -> None:
        x = self._architecture.unit_norm(norm, inputs[0]).flatten(0, -2).double()
        if self._sum is None:
            self._sum = x.new_zeros(x.shape[1], x.shape[1])
        self._sum.addmm_(x.T, x)
        self._tokens += len(x)

    def finish(self) -> torch.Tensor:
        """Detach from the model and return the mean, [D, D] float64."""
        self._hook.remove()
        assert self._sum is not None, "the layer has run"
        if not self._sum.isfinite().all():
            raise LarosaError(f"{self._where}: calibration activations are NaN or Inf; is the checkpoint sound?")
        return self._sum / self._tokens


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
