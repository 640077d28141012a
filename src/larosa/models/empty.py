"""Models whose weights are still to be filled, in memory that is taken once, where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from larosa.architectures import find_architecture


def empty_model(config: Any, dtype: torch.dtype, device: torch.device, shared: Mapping[str, nn.Parameter]) -> Any:
    """A dense or converted model, its weights uninitialised.

    Args:
        shared: see `take_memory`.
    """
    model = model_without_memory(config, dtype)
    take_memory(model, device, shared)
    return model


def model_without_memory(config: Any, dtype: torch.dtype) -> Any:
    """A dense or converted model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def take_memory(model: Any, device: torch.device, shared: Mapping[str, nn.Parameter]) -> None:
    """Give a model without any its memory on a device, uninitialised.

    Args:
        shared: weights of another model on that device, by name. They are this model's too, where it has such of the
            same shape and dtype.
    """
    for name, weight in shared.items():
        module, _, leaf = name.rpartition(".")
        place = model.get_submodule(module)
        own = getattr(place, leaf, None)
        if own is not None and (own.shape, own.dtype) == (weight.shape, weight.dtype):
            setattr(place, leaf, weight)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    with device:  # its tables are no weights, and are computed where they lie
        model.model.rotary_emb = type(find_architecture(model.config.model_type).rotary(model))(model.config)
