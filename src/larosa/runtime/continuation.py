"""A prompt's continuation: what was asked for, and from each step's logits to what is told about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from larosa.decoding.loop import checked
from larosa.decoding.sampling import Sampler, Sampling
from larosa.decoding.text import TextStream
from larosa.runtime.logprobs import PromptLogprobs, TokenLogprob, token_logprobs

if TYPE_CHECKING:
    from larosa.runtime.llm import LLM
    from larosa.runtime.session import Session

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Args:
        prompt: token ids, at least one.
        max_tokens: to draw at most; 0 only runs the prompt.
        sampling: how tokens are drawn.
        stop: strings that end the text, which they are no part of.
        ends: tokens that end the text, beside the model's own.
        logprobs: tell each drawn token's log-probability and so many of the likeliest tokens; None for neither.
        prompt_logprobs: likewise of the prompt's tokens. All of the prompt runs then.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Event:
    """What a step has brought.

    Args:
        text: what can be shown of the continuation beyond earlier events.
        token: the drawn one; None where none was asked for.
        logprob: of the token, where asked for.
        prompt_logprobs: of the prompt's tokens, with the first event, where asked for.
        finish_reason: of the last event: `stop` after an end token or a stop string, `length` after `max_tokens`.
    """

    text: str
    token: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


class Continuation:
    """One request on its way: `prompt_piece` for each piece of the prompt, then `put` for each token's logits."""

    def __init__(self, llm: LLM, request: Request, session: Session) -> None:
        self.request = request
        #: How many tokens have been drawn.
        self.drawn = 0
        #: The last of them, to be run next.
        self.token = -1
        #: Why the text has ended; None while it goes on.
        self.finished: FinishReason | None = None
        self._session, self._lossless = session, llm.lossless
        self._sampler = Sampler(request.sampling, device=llm.weights.device, kernels=llm.weights.device.type != "cpu")
        self._pieces: list[str] = []
        self._text = TextStream(llm.tokenizer, list(request.prompt), self._pieces.append, request.stop)
        self._ends = llm.end_tokens | request.ends
        self._hidden = torch.empty(0)
        self._prompt: PromptLogprobs | None = None
        if request.prompt_logprobs is not None:
            self._prompt = PromptLogprobs(request.prompt, request.prompt_logprobs)

    def prompt_piece(self, hidden: torch.Tensor) -> None:
        """Take what `Session.advance` gives for the prompt's next piece."""
        self._hidden = hidden[-1:]
        if self._prompt is not None:
            self._prompt.put(self._session.logits, hidden)

    def first(self) -> Event:
        """What the prompt has brought, once all of it has run.

        Raises:
            LarosaError: the logits are NaN or Inf.
        """
        prompt, self._prompt = None if self._prompt is None else self._prompt.found, None
        if self.request.max_tokens == 0:
            self.finished = "length"
            return Event("", None, prompt_logprobs=prompt, finish_reason="length")
        logits = self._session.logits(self._hidden)
        self._sampler.start(torch.tensor([list(self.request.prompt)]), logits.shape[-1])
        return self.put(logits, prompt)

    def put(self, logits: torch.Tensor, prompt_logprobs: Sequence[TokenLogprob] | None = None) -> Event:
        """Draw the next token from logits [1, vocabulary] float32.

        Raises:
            LarosaError: they are NaN or Inf.
        """
        if self._lossless:  # by noise of its own, as drafted ones: whether a token was drafted does not show
            (token,) = self._sampler.accept(logits)
        else:
            token = checked(self._sampler(logits))[0]
        return self._told(token, logits, prompt_logprobs)

    def drafted(self) -> Iterator[Event]:
        """Run the last token and what is drafted behind it: an event for each token that comes of it.

        Raises:
            LarosaError: the logits are NaN or Inf.
        """
        left = self.request.max_tokens - self.drawn
        new, logits = self._session.step_drafted(self.token, left, self._sampler)
        for token, row in zip(new, logits.split(1), strict=True):
            yield self._told(token, row)
            if self.finished:
                return

    def _told(self, token: int, logits: torch.Tensor, prompt_logprobs: Sequence[TokenLogprob] | None = None) -> Event:
        """What a token brings that was drawn from logits [1, vocabulary]."""
        self.token = token
        self.drawn += 1
        logprob = None
        if self.request.logprobs is not None:
            (logprob,) = token_logprobs(logits, [self.token], self.request.logprobs)
        self._text.put(self.token)
        ended = self.token in self._ends
        if ended or self.drawn == self.request.max_tokens:
            self._text.end()
        if ended or self._text.stopped:
            self.finished = "stop"
        elif self.drawn == self.request.max_tokens:
            self.finished = "length"
        text = "".join(self._pieces)
        self._pieces.clear()
        return Event(text, self.token, logprob, prompt_logprobs, self.finished)
