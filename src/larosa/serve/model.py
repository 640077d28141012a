"""A model under the name that clients call it by."""

from __future__ import annotations

import time
from typing import Any

from larosa.calibration.sources import check_text
from larosa.checkpoint import LoadedModel
from larosa.context import context_length
from larosa.decoding import CacheDtype
from larosa.errors import LarosaError
from larosa.runtime import LLM, Scheduler
from larosa.serve.errors import ApiError
from larosa.sparsity.report import inspect_config

#: Longest text where nobody says: a cache of this length is made for each of the texts at once.
_DEFAULT_LENGTH = 8192


def open_model(
    name: str,
    loaded: LoadedModel,
    *,
    max_length: int | None = None,
    kv_cache_dtype: str = CacheDtype.AUTO,
    template: str | None = None,
    max_sequences: int = 8,
    max_waiting: int = 64,
) -> ServedModel:
    """A loaded model under a name.

    Args:
        max_length: see `LLM`; None for the model's context, but 8192 at most.
        template: a chat template in place of the tokenizer's own.
        max_sequences, max_waiting: see `Scheduler`.

    Raises:
        LarosaError: see `LLM` and `Scheduler`.
    """
    model, tokenizer = loaded
    length = min(context_length(model.config), _DEFAULT_LENGTH) if max_length is None else max_length
    llm = LLM(model, tokenizer, length, kv_cache_dtype)
    return ServedModel(name, llm, Scheduler(llm, max_sequences, max_waiting), template)


class ServedModel:
    """A model and its scheduler, which is closed with the server, and what requests are completed with.

    Args:
        template: a chat template in place of the tokenizer's own.
    """

    def __init__(self, name: str, llm: LLM, scheduler: Scheduler, template: str | None = None) -> None:
        self.name, self.llm, self.scheduler = name, llm, scheduler
        own = llm.tokenizer.chat_template
        self.template: str | None = template or (own.get("default") if isinstance(own, dict) else own)
        self._created = int(time.time())
        report = inspect_config(llm.config)
        dense, sparse = (total + report.head_bytes for total in (report.bytes_dense_total, report.bytes_sparse_total))
        self._read = sparse / dense

    def encode(self, prompt: str | list[int], special: bool = True) -> list[int]:
        """A prompt's tokens.

        Args:
            special: with those that the tokenizer puts around a text.

        Raises:
            ApiError: it is empty, or no text or token ids of this model.
        """
        if isinstance(prompt, str):
            try:
                check_text(prompt, "the prompt")
                if special:
                    return self.llm.encode(prompt)
                ids: list[int] = self.llm.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            except LarosaError as error:
                raise ApiError(400, str(error), "prompt") from None
        else:
            ids = prompt
        vocabulary = self.llm.config.vocab_size
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
