"""The processes that run one model together, as torchrun starts them, and what they tell each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.errors import LarosaError
from larosa.ops.cuda.launch import next_launch_waits


class Over(StrEnum):
    """Of which entries of h2 and h4, whose parts lie on several ranks, Top-K keeps the largest.

    All ranks together what one process keeps of `all`; or each its share of its `own`, without a word to the others.
    """

    ALL = "all"
    OWN = "own"


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `size` processes, with its device and the group that connects them.

    What they tell each other comes out the same on all of them, to the bit.
    """

    rank: int
    size: int
    device: torch.device
    over: Over = Over.ALL
    group: Any = None  # of torch.distributed; None is the one of all processes

    @property
    def first(self) -> bool:
        """Whether it is this rank that adds what is to be added once."""
        return self.rank == 0

    def part(self, total: int, step: int = 1) -> slice:
        """The rank's of `total` entries in a row: as many for each, in whole `step`s, the rest for the last."""
        most = self.most(total, step)
        start = min(self.rank * most, total)
        return slice(start, min(start + most, total))

    def most(self, total: int, step: int = 1) -> int:
        """How many entries the first rank's part has, and no other has more."""
        return -(-total // (self.size * step)) * step

    def share(self, count: int, total: int) -> int:
        """How many of `count` entries of `total` fall to this rank's part: the shares of all ranks add up."""
        part = self.part(total)
        return count * part.stop // total - count * part.start // total

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a contiguous x of one shape, in its place."""
        dist.all_reduce(x, group=self.group)
        self._joined(x)
        return x

    def gather(self, x: torch.Tensor, total: int, step: int = 1) -> torch.Tensor:
        """The vectors [..., total] of which each rank has its `part` in x [..., part]."""
        *rows, width = x.shape
        most = self.most(total, step)
        # What is told has one size.
        mine = (x if width == most else F.pad(x, (0, most - width))).contiguous()
        parts = x.new_empty(self.size, *rows, most)
        # PyTorch 2.13 has renamed it.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts.view(-1), mine.view(-1), group=self.group)
        self._joined(x)
        return parts.movedim(0, -2).reshape(*rows, self.size * most)[..., :total]

    def _joined(self, x: torch.Tensor) -> None:
        if x.is_cuda:
            next_launch_waits()


def start(device: str = "auto", over: Over = Over.ALL) -> Ranks | None:
    """Join the processes that torchrun has started; None in a process of its own.

    They speak by NCCL where each has a GPU, else by gloo.

    Args:
        device: `auto`, `cpu` or `cuda`, where each process takes the GPU of its number.
        over: of which entries Top-K keeps the largest.

    Raises:
        LarosaError: a device that cannot be each rank's, or fewer GPUs than ranks.
    """
    size = started()
    if size == 1:
        return None
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise LarosaError(f"--device {device}: each of {size} ranks has a device of its own, give cuda or cpu")
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if kind == "cpu":
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return Ranks(rank, size, torch.device("cpu"), over)
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
    if here > gpus:
        raise LarosaError(f"{here} ranks need a GPU each and {gpus} are visible: start fewer, or add --device cpu")
    place = torch.device("cuda", local)
    torch.cuda.set_device(place)
    if not dist.is_initialized():
        # Multicast over NVLink needs a fabric manager that not every machine has, and small sums gain nothing by it.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        dist.init_process_group("nccl", device_id=place)
    return Ranks(rank, size, place, over)


def started() -> int:
    """How many processes torchrun has started for one program; 1 where this is a process of its own."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _launched() else 1


def this_rank() -> int:
    """Which of them this process is."""
    return int(os.environ["RANK"]) if started() > 1 else 0


def _launched() -> bool:
    # Not every build of PyTorch has processes that work together.
    return dist.is_available() and dist.is_torchelastic_launched()
