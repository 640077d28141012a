"""One HTTP request's texts in a scheduler's hands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest

from larosa.runtime import Event, Request, Scheduler
from larosa.serve.errors import ApiError
from larosa.serve.metrics import Metrics


class ClientGoneError(Exception):
    """Nobody is there to answer."""


class Run:
    """Submits requests, and tells their events as they come, until all have ended or the client leaves.

    Args:
        http: whose body has been read.
        seconds: that it may take.

    Raises:
        LarosaError: the scheduler does not take them; see `Scheduler.submit`.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], http: HttpRequest, seconds: float, metrics: Metrics
    ) -> None:
        self._http, self._metrics = http, metrics
        self._started = time.monotonic()
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        receivers = [partial(self._receive, index) for index in range(len(requests))]
        self._tickets = scheduler.submit(requests, receivers, seconds)
        self._requests = requests
        self._drawn = 0

    def _receive(self, index: int, event: Event | Exception) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Events, each with the index of its request.

        Raises:
            ApiError: a text failed; the others are given up.
            ClientGoneError: the client has left.
        """
        gone = asyncio.create_task(self._until_gone())
        left = len(self._requests)
        try:
            while left:
                coming = asyncio.create_task(self._events.get())
                await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    raise ClientGoneError
                index, event = coming.result()
                if isinstance(event, Exception):
                    raise ApiError.of(event) from event
                if not self._drawn:
                    self._metrics.first_token.observe(time.monotonic() - self._started)
                self._drawn += event.token is not None
                left -= event.finish_reason is not None
                yield index, event
            self._metrics.duration.observe(time.monotonic() - self._started)
        finally:
            gone.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Give up what has not ended."""
        for ticket in self._tickets:
            ticket.cancel()

    async def _until_gone(self) -> None:
        with suppress(Exception):
            while (await self._http.receive())["type"] != "http.disconnect":
                pass

    def usage(self) -> dict[str, Any]:
        """Tokens so far; a prompt with several choices counts once."""
        prompts = {id(request.prompt): len(request.prompt) for request in self._requests}
        total = sum(prompts.values())
        cached = {id(ticket.request.prompt): ticket.cached_tokens for ticket in reversed(self._tickets)}
        return {
            "prompt_tokens": total,
            "completion_tokens": self._drawn,
            "total_tokens": total + self._drawn,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }
