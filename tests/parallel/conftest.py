"""Ranks as threads of this process, which speak by gloo as processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo

from larosa.checkpoints.shards import load_shard
from larosa.parallel import Over, Ranks

#: A rank that fails leaves the others waiting; and a busy machine may stop all of them for minutes.
_PATIENCE = timedelta(minutes=5)


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """on_ranks(size, run, over): what run(ranks) gives on each of so many ranks."""

    def start(size: int, run: Callable[[Ranks], Any], over: Over = Over.ALL) -> list[Any]:
        store = HashStore()
        results: list[Any] = [None] * size
        errors: list[BaseException | None] = [None] * size

        def one(rank: int) -> None:
            try:
                group = ProcessGroup(store, rank, size)
                gloo = ProcessGroupGloo(store, rank, size, _PATIENCE)
                group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
                results[rank] = run(Ranks(rank, size, torch.device("cpu"), over, group))
            except BaseException as error:  # told below, in the test's own thread
                errors[rank] = error

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not any(errors):
            for thread in threads:
                thread.join(0.05)
        for error in errors:
            if error is not None:
                raise error
        return results

    return start


#: transformers changes its own classes and PyTorch's defaults while it makes a model.
_one_at_a_time = threading.Lock()


@pytest.fixture(scope="session")
def load_here() -> Callable[[str, Ranks], Any]:
    """load_here(folder, ranks): a rank's shard, loaded while no other is."""

    def load(folder: str, ranks: Ranks) -> Any:
        with _one_at_a_time:
            return load_shard(folder, ranks).model

    return load
