"""Decoding by the model's own forward: runs everything that transformers runs, and reads every weight."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from larosa.architectures import cache_argument


class ForwardEngine:
    """The same interface as `Engine` over transformers' forward and cache, for any number of sequences at once."""

    def __init__(self, model: Any) -> None:
        self.device: torch.device = model.get_input_embeddings().weight.device
        self._model = model
        self._past = DynamicCache(config=model.config)

    @torch.inference_mode()
    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Run prompts [B, length] int64, in place of all that came before; the next tokens' logits [B, V] float32."""
        self._past = DynamicCache(config=self._model.config)
        return self._logits(prompt.to(self.device))

    @torch.inference_mode()
    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Run one token [B] int64 of each sequence at position [1] int64; the next tokens' logits [B, V] float32."""
        return self._logits(token[:, None], position_ids=position[None])

    def _logits(self, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = self._model(ids, use_cache=True, logits_to_keep=1, **cache_argument(self._model, self._past), **kwargs)
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits
