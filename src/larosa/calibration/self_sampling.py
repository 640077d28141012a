"""Calibration without data: sequences sampled from the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from larosa.calibration.precision import float32_arithmetic
from larosa.utils.finite import not_finite
from larosa.utils.progress import advance


def sample_sequences(model: Any, num_sequences: int, sequence_length: int, seed: int) -> torch.Tensor:
    """Sample token sequences from the model's own distribution, untruncated, at temperature 1.

    Each starts from the beginning-of-sequence token, or, where the model has none, from a token drawn
    uniformly from the vocabulary. The end-of-sequence token is not drawn, so that every sequence has
    full length.

    Args:
        model: a dense causal language model.

    Returns:
        [num_sequences, sequence_length] int64 on the CPU; the same for the same seed and device.

    Raises:
        LarosaError: the model's probabilities are NaN or Inf.
    """
    config = model.config
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if config.bos_token_id is not None:
            start = torch.full((num_sequences, 1), config.bos_token_id)
        else:
            start = torch.randint(config.vocab_size, (num_sequences, 1))
        steps = sequence_length - 1
        if steps == 0:
            return start
        with advance("Sampling tokens", total=steps) as tick, float32_arithmetic(model, device, steps=True):
            ids = _generate(model, start.to(device), steps, tick)
    return ids.cpu()


def _generate(model: Any, start: torch.Tensor, steps: int, tick: Callable[[], None]) -> torch.Tensor:
    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tick()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    own_config = model.generation_config
    # Without the model's own settings: any of them that is not named here would still apply.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=steps,
        max_new_tokens=steps,
        eos_token_id=own_config.eos_token_id,
        pad_token_id=own_config.pad_token_id or 0,
    )
    try:
        ids: torch.Tensor = model.generate(start, attention_mask=torch.ones_like(start), stopping_criteria=[stop])
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise not_finite("the model's logits are", model.dtype) from None
    finally:
        model.generation_config = own_config
    return ids
