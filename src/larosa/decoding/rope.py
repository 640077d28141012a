"""Rotary embeddings as tables, one row a position."""

from __future__ import annotations

from typing import Any

import torch

from larosa.architectures import Architecture
from larosa.errors import LarosaError


def rotary_tables(model: Any, architecture: Architecture, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0 to `length` - 1, each [length, d] float32, by the model's own module.

    Raises:
        LarosaError: the model's rotary embedding depends on how long the text is, and changes before `length`.
    """
    rotary = architecture.rotary(model)
    fixed_up_to = _fixed_up_to(rotary)
    if fixed_up_to is not None and length > fixed_up_to:
        raise LarosaError(
            f"rope type '{rotary.rope_type}' changes all positions once the text is over {fixed_up_to} tokens: "
            "ask for fewer tokens, or use --engine transformers"
        )
    device = architecture.embedding(model).weight.device
    positions = torch.arange(length, device=device)[None]
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
    return cos[0].contiguous(), sin[0].contiguous()


def _fixed_up_to(rotary: Any) -> int | None:
    """The length up to which the frequencies do not depend on the length; None where they never do."""
    if rotary.rope_type == "dynamic":
        return int(rotary.original_max_seq_len)
    if rotary.rope_type == "longrope":
        return int(rotary.config.rope_parameters["original_max_position_embeddings"])
    return None
