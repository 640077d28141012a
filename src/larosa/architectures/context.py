"""How long a text a model is made for."""

from __future__ import annotations

from typing import Any

#: Rotary embeddings that stretch the positions of a model's training by a factor.
_STRETCHING = ("linear", "dynamic", "yarn")


def context_length(config: Any) -> int:
    """The most tokens that a model's positions are meant for.

    It is `max_position_embeddings`, which with scaled rotary embeddings may be the length before scaling: some
    configurations (Qwen2.5 with YaRN) leave it there, others (Llama 3.1) give the length that scaling makes.
    """
    given: int = config.max_position_embeddings
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") not in _STRETCHING:
        return given
    original = scaling.get("original_max_position_embeddings") or given
    return max(given, int(original * scaling.get("factor", 1)))
