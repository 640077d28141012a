"""Conversations as prompts: a tokenizer's chat template, and the tokens that end a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from larosa.errors import LarosaError

#: A message has a `role` (system, user or assistant) and its `content`.
Messages = Sequence[Mapping[str, str]]

#: Stands for an answer, to see what a template puts behind one.
_ANSWER = "larosa-answer"


def conversation(system: str | None, *messages: str | Mapping[str, str]) -> Messages:
    """Messages behind a system message, if there is one; a text is a user's."""
    said = [{"role": "user", "content": message} if isinstance(message, str) else message for message in messages]
    return said if system is None else [{"role": "system", "content": system}, *said]


def render(tokenizer: Any, messages: Messages) -> str:
    """A conversation as the text after which the model answers; special tokens are in it already.

    Raises:
        LarosaError: there is no chat template, or it refuses the conversation.
    """
    return _apply(tokenizer, messages, add_generation_prompt=True)


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """The special tokens that a chat template ends an answer with, which not every generation_config.json names."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    behind = _apply(tokenizer, messages, add_generation_prompt=False).rpartition(_ANSWER)[2]
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][:1]
    return frozenset(ids).intersection(tokenizer.all_special_ids)


def special_tokens(tokenizer: Any, strings: Sequence[str]) -> frozenset[int]:
    """The special tokens among some strings; they are left out of a text, where nobody would find them."""
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added[string] for string in strings if string in added)


def _apply(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise LarosaError("the tokenizer has no chat template: this model continues text, use larosa generate --prompt")
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of the checkpoint's and fails as it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LarosaError(f"the chat template does not take this conversation: {reason}") from None
    return text
