"""Generate text from a dense or converted model, streamed and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TextStreamer

from larosa.calibration.sources import tokenize
from larosa.errors import LarosaError


@dataclass(frozen=True)
class Generation:
    """Generated text and how fast it came.

    `text` is what follows the prompt, its leading space included. `tokens_per_second` is of decoding
    alone: the tokens after the first over the time after the first. None where fewer than two tokens were generated.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        max_new_tokens: stop after so many tokens, or earlier at an end-of-sequence token.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: of the sampling; the same seed gives the same text on the same device.
        on_text: called with each piece of text as soon as it is complete.

    Raises:
        LarosaError: a bad option, or a prompt that does not fit the model's context.
    """
    if temperature < 0:
        raise LarosaError(f"--temperature must be at least 0, not {temperature:g}")
    if not 0 < top_p <= 1:
        raise LarosaError(f"--top-p must be in (0, 1], not {top_p:g}")
    if max_new_tokens < 1:
        raise LarosaError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    ids = tokenize(prompt, tokenizer, model.config.vocab_size)
    if len(ids) == 0:
        if model.config.bos_token_id is None:
            raise LarosaError("the prompt is empty and the model has no beginning-of-sequence token")
        ids = torch.tensor([model.config.bos_token_id])
    context = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > context:
        raise LarosaError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context of {context}"
        )
    device = model.get_input_embeddings().weight.device
    inputs = ids[None].to(device)
    clock = _Clock(tokenizer, on_text)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        started = time.perf_counter()
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            streamer=clock,
            **sampling,
        )
        seconds = time.perf_counter() - started
    return Generation(
        text=clock.text,
        prompt_tokens=len(ids),
        tokens=output.shape[1] - len(ids),
        seconds=seconds,
        tokens_per_second=clock.tokens_per_second(),
    )


class _Clock(TextStreamer):
    """Collects the text, hands complete pieces of it on, and times the tokens."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text
        self._pieces: list[str] = []
        self._times: list[float] = []
        self._prompt_seen = False

    @property
    def text(self) -> str:
        """All text after the prompt."""
        return "".join(self._pieces)

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers with the prompt, then with each token, already on the CPU."""
        if self._prompt_seen:
            self._times.append(time.perf_counter())
            super().put(value)
            return
        # Decoding goes on from the prompt: many tokenizers drop the space before a first token.
        self._prompt_seen = True
        self.token_cache = value.flatten().tolist()
        self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text that no later token can change."""
        self._pieces.append(text)
        if self._on_text is not None:
            self._on_text(text)

    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None for fewer than two."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])
