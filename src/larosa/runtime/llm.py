"""A model made ready to run once, for many texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from larosa.architectures.context import context_length
from larosa.decoding import CacheDtype, Engine
from larosa.decoding.chat import Messages
from larosa.decoding.generation import prompt_ids
from larosa.decoding.loop import stop_tokens
from larosa.decoding.lossless import DRAFT_ALONE, Speculation, check_lossless, draft_weights
from larosa.decoding.steps import steps_of
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError
from larosa.parallel import Lead, whole_config
from larosa.runtime.continuation import Continuation, Event, Request
from larosa.runtime.led import LedEngine
from larosa.runtime.session import Session, step_together


class LLM:
    """A dense or converted model with its tokenizer, its weights laid out for the decode engine.

    Args:
        model: a loaded causal language model of a supported family, all on one device, in evaluation mode.
        tokenizer: the model's.
        max_length: tokens of a session, prompt included; None for the model's context.
        kv_cache_dtype: how sessions keep keys and values; see `Engine`.
        lossless: run the dense pass over the model's weights; a text that is alone is drafted for it.
        draft: what drafts; see `larosa.decoding.lossless.draft_weights`.
        lead: of the ranks that run the model, where the first of them alone writes texts: it makes sessions and runs
            them, others make as many and `follow`. None for one process, or for ranks that do all the same.

    Raises:
        LarosaError: a model that the engine cannot run, or not losslessly; a length beyond its context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int | None = None,
        kv_cache_dtype: str = CacheDtype.AUTO,
        lossless: bool = False,
        draft: Any = None,
        lead: Lead | None = None,
    ) -> None:
        context = context_length(model.config)
        if max_length is not None and not 0 < max_length <= context:
            raise LarosaError(f"a length of {max_length} tokens: the model's context is 1 to {context}")
        if draft is not None and not lossless:
            raise LarosaError(DRAFT_ALONE)
        self.weights = weights = DecoderWeights(model)
        self.lossless = lossless
        self._draft: DecoderWeights | None = None
        if lossless:
            check_lossless(weights)
            self.weights, self._draft = weights.whole(), draft_weights(weights, draft)
        self.tokenizer = tokenizer
        self.config = model.config
        #: Of the whole model, of which this may be one rank's shard.
        self.whole_config = whole_config(model)
        self.lead = lead
        self.max_length = max_length or context
        self.kv_cache_dtype = CacheDtype.parse(kv_cache_dtype)
        self.generation_config = model.generation_config
        self.end_tokens = stop_tokens(model)
        self.weights.tables(self.max_length)  # refuses a length that the rotary embedding does not bear

    def session(self) -> Session:
        """A new text; see `sessions`."""
        (session,) = self.sessions(1)
        return session

    def sessions(self, count: int) -> list[Session]:
        """New texts whose tokens run together in one step.

        Raises:
            LarosaError: there is too little memory for their caches.
        """
        engine = Engine(self.weights, self.max_length, self.kv_cache_dtype, count)
        speculation = Speculation(engine, self._draft) if self.lossless else None
        steps = steps_of(engine, count) if speculation is None else speculation.steps
        if self.lead is not None:
            led = LedEngine(engine, steps, self.lead)
            return [Session(led, led.steps, text) for text in range(count)]
        return [Session(engine, steps, text, speculation) for text in range(count)]

    def encode(self, prompt: str | Messages) -> list[int]:
        """The tokens of a text, for an empty one the beginning-of-sequence token, or of a conversation.

        Raises:
            LarosaError: see `larosa.decoding.generation.prompt_ids`.
        """
        ids: list[int] = prompt_ids(self, self.tokenizer, prompt).tolist()
        return ids

    def step(self, sessions: Sequence[Session], tokens: Sequence[int]) -> torch.Tensor:
        """Run one drawn token of each session; see `step_together`."""
        return step_together(sessions, tokens)

    def stream(self, request: Request, session: Session | None = None) -> Iterator[Event]:
        """Continue a prompt, token by token.

        Args:
            session: to run in, of this model; what it holds of the prompt does not run again. None makes one.

        Raises:
            LarosaError: the prompt does not fit, or logits are NaN or Inf.
        """
        session = session or self.session()
        if len(request.prompt) + request.max_tokens > self.max_length:
            raise LarosaError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones do not fit a session "
                f"of {self.max_length}"
            )
        continuation = Continuation(self, request, session)
        session.start(request.prompt, reuse=request.prompt_logprobs is None)
        while session.left:
            continuation.prompt_piece(session.advance())
        yield continuation.first()
        while not continuation.finished:
            if self.lossless:
                yield from continuation.drafted()
            else:
                yield continuation.put(self.step([session], [continuation.token]))
