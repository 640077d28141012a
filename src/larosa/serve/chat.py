"""/v1/chat/completions: a conversation's next message."""

from __future__ import annotations

import inspect
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from larosa.decoding.chat import render
from larosa.errors import LarosaError
from larosa.runtime import Event, Request, TokenLogprob
from larosa.runtime.logprobs import TokenTexts
from larosa.serve.errors import ApiError
from larosa.serve.model import ServedModel
from larosa.serve.reasoning import ReasoningSplitter
from larosa.serve.schema import ChatRequest, Message


class Chat:
    """What answers one request: its messages, and the form that they are told in."""

    def __init__(self, served: ServedModel, body: ChatRequest) -> None:
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens: give one of them", "max_tokens")
        self._model, self._body = served.name, body
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        text = _prompt(served, body)
        prompt = served.encode(text, special=False)
        limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        seed = secrets.randbits(62) if body.seed is None else body.seed
        #: One for each choice.
        self.requests = [
            Request(
                prompt=prompt,
                max_tokens=served.max_tokens(prompt, limit, served.llm.max_length),
                sampling=served.sampling(body, seed + choice),
                stop=served.stops(body),
                ends=served.turn_ends | served.ends(body),
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            )
            for choice in range(body.n or 1)
        ]
        self._told = [False] * len(self.requests)
        self._splitters = [ReasoningSplitter(text) for _ in self.requests]
        self._texts = TokenTexts(served.llm.tokenizer)
        self._before = [prompt[-1] for _ in self.requests]

    def pieces(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds to a message, as a stream tells it."""
        if not self._told[index]:
            self._told[index] = True
            yield self._chunk(index, {"role": "assistant", "content": ""})
        delta = self._delta(index, event)
        logprobs = self._logprobs(index, event.logprob)
        if delta or logprobs or event.finish_reason:
            yield self._chunk(index, delta, logprobs, event.finish_reason)

    def whole(self, events: list[list[Event]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to all events of each request."""
        choices = []
        for index, own in enumerate(events):
            parts = [self._delta(index, event) for event in own]
            logprobs = [self._logprobs(index, event.logprob) for event in own]
            message = {"role": "assistant", "content": "".join(part.get("content", "") for part in parts)}
            if reasoning := "".join(part.get("reasoning_content", "") for part in parts):
                message["reasoning_content"] = reasoning
            rows = [row for told in logprobs if told for row in told["content"]] if self._body.logprobs else None
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": None if rows is None else {"content": rows},
                    "finish_reason": own[-1].finish_reason,
                }
            )
        return self._answer("chat.completion", choices) | {"usage": usage}

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """What ends a stream that tells the usage."""
        return self._answer("chat.completion.chunk", []) | {"usage": usage}

    def _delta(self, index: int, event: Event) -> dict[str, str]:
        parts = self._splitters[index].put(event.text, last=event.finish_reason is not None)
        named = {"reasoning_content": parts.reasoning, "content": parts.content}
        return {name: text for name, text in named.items() if text}

    def _logprobs(self, index: int, row: TokenLogprob | None) -> dict[str, Any] | None:
        if row is None or row.logprob is None:
            return None
        before, self._before[index] = self._before[index], row.token

        def told(token: int, logprob: float) -> dict[str, Any]:
            text, spelt = self._texts.text(token, before), self._texts.bytes(token, before)
            return {"token": text, "logprob": logprob, "bytes": spelt}

        return {"content": [told(row.token, row.logprob) | {"top_logprobs": [told(*pair) for pair in row.top]}]}

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._answer("chat.completion.chunk", [choice])

    def _answer(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def _prompt(served: ServedModel, body: ChatRequest) -> str:
    """The conversation as the model's template has it, up to where the answer begins."""
    template = served.template
    if template is None:
        raise ApiError(
            400, f"'{served.name}' has no chat template: use /v1/completions, or --chat-template", "messages"
        )
    tools = None if body.tool_choice == "none" else body.tools or None
    if tools and "tools" not in template:
        raise ApiError(400, f"the chat template of '{served.name}' takes no tools", "tools")
    messages = [_message(message) for message in body.messages]
    options = body.chat_template_kwargs or {}
    # Names of transformers' own, among which is a template to run instead, are none of the template's.
    own = inspect.signature(served.llm.tokenizer.apply_chat_template).parameters
    if reserved := sorted(own.keys() & options.keys()):
        raise ApiError(400, f"chat_template_kwargs: must not have '{reserved[0]}'", "chat_template_kwargs")
    try:
        return render(served.llm.tokenizer, messages, tools=tools, **options)
    except LarosaError as error:
        raise ApiError(400, str(error), "messages") from None


def _message(message: Message) -> dict[str, Any]:
    told = message.model_dump(exclude_none=True)
    content = message.content
    told["content"] = content if isinstance(content, str) else "".join(part.text for part in content or ())
    for call in told.get("tool_calls", ()):
        # Templates write them out by themselves.
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError:
            raise ApiError(400, "messages: a tool call's arguments are not JSON", "messages") from None
    return told
