"""A conversation with a model, turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from larosa.architectures.context import context_length
from larosa.decoding.chat import Messages, conversation
from larosa.decoding.generation import Generation, generate, prompt_ids
from larosa.decoding.sampling import Sampling
from larosa.errors import LarosaError


class Conversation:
    """Keeps what has been said, and answers each message from all of it.

    The whole conversation runs again for each answer: keys and values of what was drawn are not those of a prompt
    where a checkpoint leaves prompts dense, and a template may leave out of the past what it likes.

    Args:
        system: what the model is told before; None leaves that to the template.
        sampling: None for what the checkpoint's generation settings say.
        max_new_tokens: of one answer, which also ends with the model's context.
        options: further ones of `generate`.

    Raises:
        LarosaError: there is no chat template, it takes no system message, or no token is asked for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None = None,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 1024,
        **options: Any,
    ) -> None:
        if max_new_tokens < 1:
            raise LarosaError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
        self._model, self._tokenizer, self._system = model, tokenizer, system
        self._limit = max_new_tokens
        self._options = asdict(sampling or Sampling.of(model.generation_config)) | options
        self._messages: list[dict[str, str]] = []
        self.room("?")

    def clear(self) -> None:
        """Forget what has been said, but for the system message."""
        self._messages = []

    def room(self, text: str) -> int:
        """How many tokens the model's context leaves for an answer to a message.

        Raises:
            LarosaError: none, the message is no Unicode text, or the chat template does not take it.
        """
        context = context_length(self._model.config)
        length = len(prompt_ids(self._model, self._tokenizer, self._prompt(text)))
        if length >= context:
            raise LarosaError(
                f"the conversation has {length} tokens and the model's context is {context}: /clear begins anew"
            )
        return context - length

    def _prompt(self, text: str) -> Messages:
        return conversation(self._system, *self._messages, text)

    def answer(self, text: str, on_text: Callable[[str], None]) -> Generation:
        """Answer a message. Of an answer that is interrupted, what had come is kept.

        Args:
            on_text: called with each piece of the answer as soon as it is complete.

        Raises:
            LarosaError: as `room` and `generate` do. The message is forgotten.
        """
        pieces: list[str] = []

        def hand_on(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            return generate(
                self._model,
                self._tokenizer,
                self._prompt(text),
                max_new_tokens=min(self._limit, self.room(text)),
                on_text=hand_on,
                **self._options,
            )
        finally:
            if pieces:
                self._messages += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "".join(pieces)},
                ]
