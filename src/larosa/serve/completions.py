"""/v1/completions: texts continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from larosa.runtime import Event, Request, TokenLogprob
from larosa.runtime.logprobs import TokenTexts
from larosa.serve.errors import ApiError
from larosa.serve.model import ServedModel
from larosa.serve.schema import CompletionRequest

#: OpenAI's, where a request says nothing.
_DEFAULT_MAX_TOKENS = 16


class Completion:
    """What answers one request: its texts, and the form that they are told in."""

    def __init__(self, served: ServedModel, body: CompletionRequest) -> None:
        choices = body.n or 1
        if body.best_of not in (None, choices):
            raise ApiError(400, "best_of: only as much as n is supported", "best_of")
        self._model, self._body, self._choices = served.name, body, choices
        self._tokenizer = served.llm.tokenizer
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._prompts = [served.encode(prompt) for prompt in body.prompts]
        seed = secrets.randbits(62) if body.seed is None else body.seed
        #: One for each choice of each prompt, prompts first.
        self.requests = [
            Request(
                prompt=prompt,
                max_tokens=served.max_tokens(prompt, body.max_tokens, _DEFAULT_MAX_TOKENS),
                sampling=served.sampling(body, seed + choice),
                stop=served.stops(body),
                ends=served.ends(body),
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
            )
            for prompt in self._prompts
            for choice in range(choices)
        ]
        self._told = [False] * len(self.requests)
        self._logprobs = [_Logprobs(self._tokenizer) for _ in self.requests]

    def pieces(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds to a choice, as a stream tells it."""
        text = event.text
        rows = [*(event.prompt_logprobs or ()), *([event.logprob] if event.logprob else ())]
        if self._body.echo and not self._told[index]:
            text = self._prompt_text(index) + text
        self._told[index] = True
        if text or rows or event.finish_reason:
            logprobs = None if self._body.logprobs is None else self._logprobs[index].added(rows)
            yield self._answer([_choice(index, text, logprobs, event.finish_reason)])

    def whole(self, events: list[list[Event]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to all events of each request."""
        choices = []
        for index, own in enumerate(events):
            pieces = [choice for event in own for piece in self.pieces(index, event) for choice in piece["choices"]]
            logprobs: dict[str, list[Any]] | None = None
            if self._body.logprobs is not None:
                logprobs = {key: [x for piece in pieces for x in piece["logprobs"][key]] for key in _Logprobs.keys}
            text = "".join(piece["text"] for piece in pieces)
            choices.append(_choice(index, text, logprobs, pieces[-1]["finish_reason"]))
        return self._answer(choices) | {"usage": usage}

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """What ends a stream that tells the usage."""
        return self._answer([]) | {"usage": usage}

    def _answer(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _prompt_text(self, index: int) -> str:
        prompt = list(self._body.prompts)[index // self._choices]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special_tokens=True)


def _choice(index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class _Logprobs:
    """The log-probabilities of a choice in the form of completions; offsets count in the tokens' texts joined."""

    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def __init__(self, tokenizer: Any) -> None:
        self._texts = TokenTexts(tokenizer)
        self._before: int | None = None
        self._offset = 0

    def added(self, rows: list[TokenLogprob]) -> dict[str, list[Any]]:
        """The next tokens'."""
        told: dict[str, list[Any]] = {key: [] for key in self.keys}
        for row in rows:
            text = self._texts.text(row.token, self._before)
            top: dict[str, float] | None = None
            if row.logprob is not None:
                top = {}
                for token, logprob in row.top:
                    top.setdefault(self._texts.text(token, self._before), logprob)
                top.setdefault(text, row.logprob)
            for key, value in zip(self.keys, (text, row.logprob, top, self._offset), strict=True):
                told[key].append(value)
            self._offset += 0 if text.startswith("bytes:") else len(text)
            self._before = row.token
        return told
