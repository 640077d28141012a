"""A model under the name that clients call it by."""

from __future__ import annotations

import copy
import time
from typing import Any

from larosa.architectures.context import context_length
from larosa.checkpoints.io import LoadedModel
from larosa.data.text import tokenize
from larosa.decoding import CacheDtype, Sampling
from larosa.decoding.chat import special_tokens, turn_ends
from larosa.decoding.generation import stop_strings
from larosa.errors import LarosaError
from larosa.parallel import Lead
from larosa.runtime import LLM, Scheduler
from larosa.serve.errors import ApiError
from larosa.serve.schema import CommonRequest
from larosa.sparsity.report import inspect_config

#: Longest text where nobody says: a cache of this length is made for each of the texts at once.
_DEFAULT_LENGTH = 8192


def open_llm(
    loaded: LoadedModel,
    *,
    max_length: int | None = None,
    kv_cache_dtype: str = CacheDtype.AUTO,
    lossless: bool = False,
    draft: Any = None,
    template: str | None = None,
    lead: Lead | None = None,
) -> LLM:
    """A loaded model as it is served.

    Args:
        max_length: see `LLM`; None for the model's context, but 8192 at most.
        lossless, draft, lead: see `LLM`.
        template: a chat template in place of the tokenizer's own.

    Raises:
        LarosaError: see `LLM`.
    """
    model, tokenizer = loaded
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    length = min(context_length(model.config), _DEFAULT_LENGTH) if max_length is None else max_length
    return LLM(model, tokenizer, length, kv_cache_dtype, lossless, draft, lead)


class ServedModel:
    """A model and its scheduler, which is closed with the server, and what requests are completed with.

    Args:
        name: that clients call it by.
        max_sequences, max_waiting: see `Scheduler`.

    Raises:
        LarosaError: see `Scheduler`.
    """

    def __init__(self, name: str, llm: LLM, max_sequences: int = 8, max_waiting: int = 64) -> None:
        self.name, self.llm = name, llm
        own = llm.tokenizer.chat_template
        self.template: str | None = own.get("default") if isinstance(own, dict) else own
        #: Tokens that end a turn of a conversation.
        self.turn_ends = frozenset() if self.template is None else turn_ends(llm.tokenizer)
        self._created = int(time.time())
        report = inspect_config(llm.whole_config)
        whole = report.bytes_dense_total + report.head_bytes
        self._read = 1.0 if llm.lossless else report.bytes_per_token / whole
        self.scheduler = Scheduler(llm, max_sequences, max_waiting)

    def encode(self, prompt: str | list[int], special: bool = True) -> list[int]:
        """A prompt's tokens.

        Args:
            special: with those that the tokenizer puts around a text.

        Raises:
            ApiError: it is empty, or no text or token ids of this model.
        """
        vocabulary = self.llm.config.vocab_size
        if isinstance(prompt, str):
            try:
                if special:
                    return self.llm.encode(prompt)
                ids: list[int] = tokenize(prompt, self.llm.tokenizer, vocabulary, special=False).tolist()
            except LarosaError as error:
                raise ApiError(400, str(error), "prompt") from None
        else:
            ids = prompt
        if not ids or max(ids) >= vocabulary:
            raise ApiError(400, f"prompt: give at least one token, all below {vocabulary}", "prompt")
        return ids

    def max_tokens(self, prompt: list[int], asked: int | None, default: int) -> int:
        """How many tokens to draw.

        Raises:
            ApiError: they and the prompt are more than the model runs.
        """
        limit = self.llm.max_length
        room = limit - len(prompt)
        if room < (1 if asked is None else asked):
            wanted = f"{len(prompt)} in the prompt" + ("" if asked is None else f", {asked} in the completion")
            message = f"this model's maximum context length is {limit} tokens, but the request needs more: {wanted}"
            raise ApiError(400, message, code="context_length_exceeded")
        return min(room, default) if asked is None else asked

    def sampling(self, body: CommonRequest, seed: int) -> Sampling:
        """How to draw: as asked, else as the checkpoint's generation settings say, else at temperature 1."""
        config = self.llm.generation_config
        given = {name: getattr(body, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        asked = {name: float(value) for name, value in given.items() if value is not None}
        if body.top_k is not None:
            asked["top_k"] = max(0, body.top_k)  # vLLM's clients turn it off by -1
        if not config.do_sample:
            asked.setdefault("temperature", 1.0)
        return Sampling.of(config, **asked, seed=seed)

    def stops(self, body: CommonRequest) -> tuple[str, ...]:
        """The strings that end a text."""
        return tuple(stop_strings(self.llm, body.stops))

    def ends(self, body: CommonRequest) -> frozenset[int]:
        """The special tokens among them, which no text shows."""
        return special_tokens(self.llm.tokenizer, self.stops(body))

    def card(self) -> dict[str, Any]:
        """What /v1/models tells; beyond OpenAI's, what the chat page shows.

        `weights_read` is the share of the dense model's bytes that a token reads, head and adapters included.
        """
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "larosa",
            "max_model_len": self.llm.max_length,
            "chat": self.template is not None,
            "weights_read": self._read,
        }
