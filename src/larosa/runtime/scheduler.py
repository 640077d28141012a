"""Many requests at once: one thread runs the model, and texts join and leave between its steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from larosa.decoding.cache import cache_bytes
from larosa.errors import LarosaError
from larosa.runtime.continuation import Continuation, Event, Request
from larosa.runtime.llm import LLM
from larosa.runtime.session import PIECE, Session
from larosa.utils.memory import available_memory

_log = logging.getLogger(__name__)

#: Takes a request's events as they come, or the exception that ended it. It must not block.
Receiver = Callable[[Event | Exception], None]


class QueueFullError(LarosaError):
    """More requests wait than may."""


class ClosedError(LarosaError):
    """The scheduler takes, or finishes, no more requests."""


class DeadlineError(LarosaError):
    """A request took longer than it may."""


@dataclass(eq=False)
class Ticket:
    """A request that a scheduler has taken."""

    request: Request
    receiver: Receiver
    deadline: float
    cancelled: bool = False
    #: Tokens of the prompt that did not have to run.
    cached_tokens: int = 0

    def cancel(self) -> None:
        """Let go of it before its next step; no event comes any more."""
        self.cancelled = True


@dataclass
class Counts:
    """What a scheduler has done so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    drawn_tokens: int = 0
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "timeout", "error"), 0)
    )


class _Live:
    """A request in its session."""

    def __init__(self, llm: LLM, ticket: Ticket, session: Session) -> None:
        self.ticket, self.session = ticket, session
        self.continuation = Continuation(llm, ticket.request, session)
        self.reuse = ticket.request.prompt_logprobs is None
        session.start(ticket.request.prompt, self.reuse)
        ticket.cached_tokens = len(session.tokens)


class Scheduler:
    """Runs the requests of many clients over one model.

    Sessions are made once, and keep the prompts that they ran: a later prompt that begins like one of them does not run
    that part again. All texts that are being written take each step together; one that is alone is drafted for, where
    the model is lossless. Between two steps at most one piece of prompts runs, of the prompts in turns.

    Args:
        llm: the model. Nobody else may run it.
        max_sequences: texts at once.
        max_waiting: requests that may wait for one of them.

    Raises:
        LarosaError: a bad number, or too little memory for the sessions' caches.
    """

    def __init__(self, llm: LLM, max_sequences: int = 8, max_waiting: int = 64) -> None:
        _check_count("waiting requests", max_waiting, least=0)
        self.llm, self.max_sequences, self.max_waiting = llm, max_sequences, max_waiting
        self._sessions = _make_sessions(llm, max_sequences)
        #: Those without a request, the one that has been so longest first.
        self._free = list(self._sessions)
        self._live: list[_Live] = []
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.counts = Counts()
        self._thread = threading.Thread(target=self._work, name="larosa-scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Requests in a session."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Requests without one."""
        return len(self._waiting)

    def submit(self, requests: Sequence[Request], receivers: Sequence[Receiver], seconds: float) -> list[Ticket]:
        """Take requests, all or none.

        Args:
            receivers: one a request. They are called by the scheduler's thread.
            seconds: after which a request ends with a `DeadlineError`.

        Raises:
            QueueFullError: too many wait.
            ClosedError: the scheduler is closed.
            LarosaError: a prompt that does not fit with what is to be drawn.
        """
        for request in requests:
            if not request.prompt or len(request.prompt) + request.max_tokens > self.llm.max_length:
                raise LarosaError(
                    f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones do not fit a "
                    f"session of {self.llm.max_length}"
                )
        deadline = time.monotonic() + seconds
        tickets = [Ticket(*pair, deadline) for pair in zip(requests, receivers, strict=True)]
        with self._changed:
            if self._closing:
                raise ClosedError("shutting down")
            self._drop_cancelled()
            if len(self._waiting) + len(tickets) > self.max_waiting + len(self._free):
                raise QueueFullError(f"{len(self._waiting)} requests are waiting; try again later")
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def close(self) -> None:
        """End all requests with a `ClosedError`, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
            self._waiting.remove(ticket)
            self.counts.finished["cancelled"] += 1

    def _work(self) -> None:
        try:
            while self._wait():
                self._sweep()
                self._admit()
                self._run_prompts()
                self._step()
        except Exception:
            _log.exception("the scheduler has failed")
        with self._changed:
            self._closing = True  # whatever the reason, nobody may wait for what does not come
        for live in list(self._live):
            self._end(live, "error", ClosedError("shutting down"))
        for ticket in self._waiting:
            self._refuse(ticket, "error", ClosedError("shutting down"))

    def _wait(self) -> bool:
        """Wait until there is something to do; whether there is."""
        with self._changed:
            while not (self._waiting or self._live or self._closing):
                self._changed.wait()
            self._drop_cancelled()
            return not self._closing

    def _sweep(self) -> None:
        """Let go of what nobody waits for any more."""
        now = time.monotonic()
        for live in list(self._live):
            if live.ticket.cancelled:
                self._end(live, "cancelled")
            elif now > live.ticket.deadline:
                self._end(live, "timeout", DeadlineError("the request took longer than it may"))
        with self._changed:
            late = [ticket for ticket in self._waiting if now > ticket.deadline]
            for ticket in late:
                self._waiting.remove(ticket)
        for ticket in late:
            self._refuse(ticket, "timeout", DeadlineError("the request waited longer than it may"))

    def _admit(self) -> None:
        while self._free:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            session = self._session_for(ticket.request.prompt)
            self._free.remove(session)
            try:
                self._live.append(_Live(self.llm, ticket, session))
            except Exception as error:
                self._free.append(session)
                self._refuse(ticket, "error", error)
            else:
                self.counts.prompt_tokens += len(ticket.request.prompt)

    def _session_for(self, prompt: Sequence[int]) -> Session:
        """The free session that has most of a prompt, if it has nothing else; else the one unused longest.

        The prefix is copied then, which costs next to nothing beside running it.
        """
        best = max(self._free, key=lambda session: session.common(prompt))
        return best if best.common(prompt) == best.reusable else self._free[0]

    def _run_prompts(self) -> None:
        """Run about one piece of prompts, and what follows a prompt's last piece."""
        budget = PIECE
        for live in [live for live in self._live if live.session.left]:
            if budget <= 0:
                return
            try:
                if live.reuse:
                    self._share(live)
                hidden = live.session.advance()
                live.continuation.prompt_piece(hidden)
                budget -= len(hidden)
                # Behind the others: prompts take turns.
                self._live.remove(live)
                self._live.append(live)
                if not live.session.left:
                    self._tell(live, live.continuation.first())
            except Exception as error:
                self._fail(live, error)

    def _share(self, live: _Live) -> None:
        """Copy what others have run of the same prompt, maybe just now."""
        held = len(live.session.tokens)
        for other in self._sessions:
            live.session.take_prefix(other)
        live.ticket.cached_tokens += len(live.session.tokens) - held

    def _step(self) -> None:
        writing = [live for live in self._live if not live.session.left]
        if not writing:
            return
        if self.llm.lossless and len(writing) == 1:
            self._step_drafted(writing[0])
            return
        try:
            logits = self.llm.step([live.session for live in writing], [live.continuation.token for live in writing])
        except Exception as error:
            for live in writing:
                self._fail(live, error)
            return
        for live, row in zip(writing, logits.split(1), strict=True):
            try:
                self._tell(live, live.continuation.put(row))
            except Exception as error:
                self._fail(live, error)

    def _step_drafted(self, live: _Live) -> None:
        try:
            for event in live.continuation.drafted():
                self._tell(live, event)
        except Exception as error:
            self._fail(live, error)

    def _tell(self, live: _Live, event: Event) -> None:
        self.counts.drawn_tokens += event.token is not None
        _tell(live.ticket, event)
        if event.finish_reason:
            self._end(live, event.finish_reason)

    def _fail(self, live: _Live, error: Exception) -> None:
        live.session.truncate(0)
        self._end(live, "error", error)

    def _end(self, live: _Live, how: str, error: Exception | None = None) -> None:
        self._live.remove(live)
        self._free.append(live.session)
        self.counts.cached_tokens += live.ticket.cached_tokens
        if error is None:
            self.counts.finished[how] += 1
        else:
            self._refuse(live.ticket, how, error)

    def _refuse(self, ticket: Ticket, how: str, error: Exception) -> None:
        if not isinstance(error, LarosaError):
            _log.error("a request failed", exc_info=error)
        self.counts.finished[how] += 1
        _tell(ticket, error)


def follow(llm: LLM, max_sequences: int) -> None:
    """Run what a scheduler of the first rank runs, on another rank, until its server ends.

    Args:
        llm: this rank's, with a lead.
        max_sequences: as of that scheduler.

    Raises:
        LarosaError: as of `Scheduler`, or see `Lead.follow`.
    """
    assert llm.lead is not None, "it is one of several ranks"
    _make_sessions(llm, max_sequences)
    llm.lead.follow()


def _make_sessions(llm: LLM, count: int) -> list[Session]:
    _check_count("sequences", count, least=1)
    _check_memory(llm, count)
    return llm.sessions(count)


def _check_count(name: str, count: int, least: int) -> None:
    if count < least:
        raise LarosaError(f"the number of {name} must be at least {least}, not {count}")


def _tell(ticket: Ticket, event: Event | Exception) -> None:
    if ticket.cancelled:
        return
    try:
        ticket.receiver(event)
    except Exception:  # whoever listened has gone
        ticket.cancelled = True


def _check_memory(llm: LLM, sessions: int) -> None:
    form = llm.kv_cache_dtype.beside(llm.weights.dtype)
    needed, free = sessions * cache_bytes(llm.config, form, llm.max_length), available_memory(llm.weights.device)
    if needed > free:
        raise LarosaError(
            f"{sessions} sequences of {llm.max_length} tokens need {needed / 1e9:.2f} GB for their keys and values and "
            f"{llm.weights.device} has {free / 1e9:.2f} GB free: lower --max-num-seqs or --max-model-len"
        )
