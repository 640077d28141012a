"""A command that torchrun has started several times, as the ranks of one model: the first of them speaks for all."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist

from larosa.checkpoints.io import LoadedModel, load
from larosa.checkpoints.shards import load_shard
from larosa.errors import LarosaError
from larosa.parallel import Over, Ranks, start, started, this_rank
from larosa.utils.progress import stderr

#: Seconds after which a rank that has failed says why. By then torchrun has ended it where the first has failed too.
_PATIENCE = 5.0


@contextmanager
def together() -> Iterator[None]:
    """Run a command as one of the ranks, if it is one, and end the process.

    Ranks but the first write nothing, unless they fail alone.
    """
    if started() == 1:
        yield
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, while this rank may be waiting for another
    said, silent = sys.stderr, this_rank() > 0
    if silent:
        sys.stdout, sys.stderr = open(os.devnull, "w"), io.StringIO()  # noqa: SIM115 - until the process ends
        stderr.quiet = True
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    if code and isinstance(sys.stderr, io.StringIO) and (reason := sys.stderr.getvalue()):
        time.sleep(_PATIENCE)
        said.write(reason)
    _end(code)


@contextmanager
def until_told() -> Iterator[None]:
    """Let the first rank decide when all end after SIGINT or SIGTERM, which torchrun passes on to each of them.

    A rank that fails after that says nothing: torchrun ends all when one has failed, which says why.
    """
    told: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: told.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    except Exception:
        if told:
            raise SystemExit(1) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def give_up(error: Exception) -> NoReturn:
    """End the first rank for an error in any of its threads; torchrun then ends the others, which wait for it."""
    reason = (str(error) or repr(error)).splitlines()[0]
    print(f"larosa: error: rank {this_rank()} cannot go on: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _end(code: int) -> NoReturn:
    """End this rank, after all others have finished too where it has."""
    if code == 0 and dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: taking NCCL down waits for graphs that nobody frees any more, or for ranks that have failed.
    os._exit(code)


def check_alone(command: str) -> None:
    """Refuse what one process does.

    Raises:
        LarosaError: torchrun has started several.
    """
    if started() > 1:
        raise LarosaError(f"larosa {command} runs in one process: leave torchrun out")


def ranks_of(device: str, over: Over | None) -> Ranks | None:
    """The ranks that this process is one of; None where it is alone.

    Raises:
        LarosaError: `--top-k-over` without any, or see `start`.
    """
    if over is not None and started() == 1:
        raise LarosaError("--top-k-over is for several ranks: start them by torchrun, or leave it out")
    return start(device, over or Over.ALL)


def load_model(path: str, *, dtype: str, device: str, trust_remote_code: bool, over: Over | None) -> LoadedModel:
    """Load a model, or one rank's shard of it; see `load` and `load_shard`."""
    ranks = ranks_of(device, over)
    if ranks is None:
        return load(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return load_shard(path, ranks, dtype=dtype, trust_remote_code=trust_remote_code)
