"""A model made ready once, and the texts that it is writing, many at a time."""

from larosa.runtime.continuation import Event, Request
from larosa.runtime.llm import LLM
from larosa.runtime.logprobs import TokenLogprob
from larosa.runtime.scheduler import ClosedError, DeadlineError, QueueFullError, Scheduler, Ticket, follow
from larosa.runtime.session import Session

__all__ = [
    "LLM",
    "ClosedError",
    "DeadlineError",
    "Event",
    "QueueFullError",
    "Request",
    "Scheduler",
    "Session",
    "Ticket",
    "TokenLogprob",
    "follow",
]
