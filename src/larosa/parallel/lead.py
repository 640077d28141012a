"""What the first rank decides and all ranks run: it tells the others of each call before it makes it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from larosa.errors import LarosaError
from larosa.parallel.ranks import Ranks

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Bytes of a message that go in one piece, which a step's do; what is beyond follows in another.
_AT_ONCE = 1024

#: How long the others wait for a call: nobody may ask a server for days.
_PATIENCE = timedelta(days=365)


class Lead:
    """Functions that only all ranks together can run, called by the first alone.

    Every rank shares the same functions in the same order. Then the first calls them, one at a time, and the others
    make the same calls in `follow`.

    Args:
        ranks: of which this process is one.
        on_failure: takes what has made a call fail on the first rank. The others may be in the middle of that call and
            wait, so that the process has to end.
        group: of all ranks, on the CPU; None makes one.
    """

    def __init__(self, ranks: Ranks, on_failure: Callable[[Exception], object], group: Any = None) -> None:
        self._ranks, self._on_failure = ranks, on_failure
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if group is None else group
        self._shared: list[Callable[..., object]] = []

    def shared(self, run: Callable[_P, _T]) -> Callable[_P, _T]:
        """A function of the first rank that runs `run` on all of them; its arguments are pickled, on the CPU."""
        number = len(self._shared)
        self._shared.append(run)

        def on_all(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            try:
                self._tell((number, args, kwargs))
                return run(*args, **kwargs)
            except Exception as error:
                self._on_failure(error)
                raise

        return on_all

    def end(self) -> None:
        """Let the others return from `follow`; of the first rank."""
        self._tell(None)

    def follow(self) -> None:
        """Make the first rank's calls, until it ends; of the others.

        Raises:
            LarosaError: one has failed, or the first rank has gone.
        """
        try:
            while (call := self._tell(None)) is not None:
                number, args, kwargs = call
                self._shared[number](*args, **kwargs)
        except Exception as error:
            raise LarosaError(f"rank {self._ranks.rank} cannot go on: {error}") from error

    def _tell(self, call: Any) -> Any:
        """What the first rank gives, on every rank."""
        told = torch.zeros(_AT_ONCE, dtype=torch.uint8)
        length, content = told[:8].view(torch.int64), told[8:]
        raw = torch.frombuffer(bytearray(pickle.dumps(call)), dtype=torch.uint8)
        if self._ranks.first:
            length[0] = len(raw)
            content[: len(raw)] = raw[: len(content)]
        dist.broadcast(told, group=self._group, group_src=0)
        size = int(length)
        if size > len(content):
            rest = raw[len(content) :] if self._ranks.first else told.new_empty(size - len(content))
            dist.broadcast(rest, group=self._group, group_src=0)
            content = torch.cat([content, rest])
        return pickle.loads(content[:size].numpy().tobytes())
