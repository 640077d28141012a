"""The loop from token to token, the same for every engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch

from larosa.decoding.sampling import Sampler
from larosa.ops.greedy import NO_TOKEN
from larosa.utils.finite import not_finite


class StepEngine(Protocol):
    """What the loop asks of an engine; see `Engine`."""

    device: torch.device

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after a prompt [1, length]."""
        ...

    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after one more token [1]."""
        ...


def continue_prompt(
    engine: StepEngine, prompt: torch.Tensor, max_new_tokens: int, sampler: Sampler, stop: Collection[int] = ()
) -> Iterator[int]:
    """Continue a prompt token by token, until one in `stop`, which still comes, or `max_new_tokens`.

    Args:
        prompt: [1, length] int64.
        max_new_tokens: at least 1. The last token is drawn but not run, so an engine needs room for one less.
        sampler: draws each token from the logits.
        stop: token ids that end the text.

    Raises:
        LarosaError: the prompt does not fit the engine, or the logits are NaN or Inf.
    """
    logits = engine.prefill(prompt)
    sampler.start(prompt, logits.shape[-1])
    position = torch.tensor([prompt.shape[1]], device=engine.device)
    for drawn in range(1, max_new_tokens + 1):
        token = sampler(logits)
        token_id = checked(token)[0]
        yield token_id
        if token_id in stop or drawn == max_new_tokens:
            return
        logits = engine.step(token, position)
        position += 1


def checked(tokens: torch.Tensor) -> list[int]:
    """The token ids that a sampler has drawn.

    Raises:
        LarosaError: the logits of one were NaN or Inf.
    """
    ids: list[int] = tokens.tolist()
    if NO_TOKEN in ids:
        raise not_finite("the model's logits are")
    return ids


def stop_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a text, by the model's generation configuration."""
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
