"""Calibration without data: sequences sampled from the model itself."""

from __future__ import annotations

from typing import Any

import torch

from larosa.errors import LarosaError


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
        try:
            ids = model.generate(
                start.to(device),
                attention_mask=torch.ones_like(start, device=device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=sequence_length - 1,
                max_new_tokens=sequence_length - 1,
                pad_token_id=config.pad_token_id or 0,
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise LarosaError("the model's logits are NaN or Inf; is the checkpoint sound?") from None
    return ids.cpu()
