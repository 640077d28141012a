"""NaN and Inf: where they are met, and what may be behind them."""

from __future__ import annotations

from typing import Any

import torch

from larosa.errors import LarosaError
from larosa.utils.layer_files import in_memory_as_they_run, parameters_in_memory

_PROBE_TOKENS = 32

#: Rows looked at a time, for whoever looks makes copies.
_ROWS = 4096


def not_finite(what: str, dtype: torch.dtype | None = None) -> LarosaError:
    """The error of NaN or Inf in `what`; `dtype` is that of the model, None where it is not at hand.

    float16 ends at 65504, which sound models exceed.
    """
    if dtype is torch.float16:
        return LarosaError(f"{what} NaN or Inf: float16 does not reach as far as this model: use --dtype bfloat16")
    also = ", or was it loaded in float16, which --dtype bfloat16 mends" if dtype is None else ""
    return LarosaError(f"{what} NaN or Inf; is the checkpoint sound{also}?")


def check_weights(model: Any) -> None:
    """Refuse a model with a weight that is NaN or Inf.

    Raises:
        LarosaError: there is one; the message names the parameter.
    """
    for name, weight in parameters_in_memory(model):
        if not _is_finite(weight):
            raise LarosaError(f"weight '{name}' holds NaN or Inf; is the checkpoint sound?")


@torch.inference_mode()
def check_converted(model: Any, sequences: torch.Tensor | None) -> None:
    """Refuse the result of a conversion that its number format does not hold: weights, or what it computes of a text.

    Rotation gathers in few entries what was spread over many, and a sum of many numbers may overflow where they did
    not: a sound model in float16 may end here.

    Args:
        model: converted.
        sequences: token ids [number, length] that it was calibrated on; None takes the first tokens there are.

    Raises:
        LarosaError: NaN or Inf.
    """
    for name, weight in parameters_in_memory(model):
        if weight.is_floating_point() and not _is_finite(weight):
            raise not_finite(f"weight '{name}' of the converted model is", weight.dtype)
    if sequences is None:
        ids = torch.arange(min(_PROBE_TOKENS, model.config.vocab_size))[None]
    else:
        ids = sequences[:1, :_PROBE_TOKENS]
    embedding = model.get_input_embeddings().weight
    with in_memory_as_they_run(model):
        logits = model(ids.to(embedding.device), use_cache=False).logits
    if not logits.isfinite().all():
        raise not_finite("the converted model's logits are", embedding.dtype)


def _is_finite(weight: torch.Tensor) -> bool:
    return all(bool(rows.isfinite().all()) for rows in weight.split(_ROWS))
