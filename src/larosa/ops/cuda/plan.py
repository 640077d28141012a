"""How a product or an attention is divided over a GPU: found from sizes alone, so that it is the same on every run.

It is the same for any number of rows, too, so that each of them gives the bits that it gives alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from larosa.ops.cuda.launch import Machine

ROW_THREADS = 1024  # of a block, in select.cu, elementwise.cu and greedy.cu
ATTEND_THREADS = 128  # the same in attend.cu: so few find room beside the blocks of the product before
SPARSE_THREADS = 512  # the same in sparse_linear.cu
_TOGETHER = 8  # rows that read their weights together at most
_SUMS = 64  # of a thread, in registers
_LOADS = 5  # about DEPTH in sparse_linear.cu: fewer loads a thread do not fill the memory system
_CLUSTERS = (1, 2, 4, 8)  # 8 blocks is what every GPU with clusters grants
_FUSED_ROOM = 64 * 1024  # bytes of shared memory in top_k_linear.cu, its list aside
#: Blocks a multiprocessor, on the average, that read as fast as more of them do.
_ENOUGH = 0.7
_NEARLY = 0.9  # the same where a product takes long
_LEAVING = 0.965  # the same, so that a few multiprocessors stay free
_SELECTING = 2  # multiprocessors that are left to the block that selects for all, and its mate in a cluster
_LANES = (32, 16, 8)
_CODES_ROOM = 128 * 1024  # bytes of shared memory in kernels that select for themselves, their list aside
_CODE_TILES = (512, 448, 384, 320, 256, 192, 128)  # outputs of a tile of codes
#: The share of an H200's multiprocessors that clusters of a size have at once, for each lies within one group of them:
#: 14 clusters of 8 take twice as long as 12, whose blocks do the same work.
_AT_ONCE = {1: 1.0, 2: 1.0, 4: 0.8, 8: 0.74}


@dataclass(frozen=True)
class SparsePlan:
    """`lanes` threads side by side along the outputs, `cluster` blocks along the list of entries."""

    lanes: int
    cluster: int
    tile: int  # outputs of a cluster
    loads: int = 5  # in flight in each thread; of codes alone


def sparse_plan(gpu: Machine, outputs: Sequence[int], k: int, element_size: int) -> SparsePlan:
    """About one block a multiprocessor, each with enough to read, and wide pieces before narrow ones.

    The weights of `_cost` rank plans of the products of 1B to 70B models as an H200 does, within a few percent.

    Args:
        gpu: for its number of multiprocessors, and whether it has clusters.
        outputs: of each matrix.
        k: entries of the list.
        element_size: bytes of a weight.
    """
    return min(_plans(gpu, element_size, _LANES), key=lambda plan: _cost(gpu, outputs, k, plan))


def alone_plan(gpu: Machine, outputs: Sequence[int], k: int, element_size: int) -> SparsePlan | None:
    """The same for a product whose blocks have a multiprocessor each; None where they would be too many or too few.

    So it is for blocks that select for themselves, or some would select for longer than others. No large clusters,
    which wait until that many multiprocessors are free.
    """
    plans = _fitting(gpu, outputs, k, _plans(gpu, element_size, _LANES), most=1.0)
    return min(plans, key=lambda plan: _cost(gpu, outputs, k, plan), default=None)


def cut_plan(gpu: Machine, outputs: Sequence[int], width: int, k: int, element_size: int) -> SparsePlan | None:
    """The same for a product of which one more block selects for all; each has room for all `width` entries."""
    most = 1.0 - _SELECTING / gpu.multiprocessors
    plans = _fitting(gpu, outputs, width, _plans(gpu, element_size, _LANES), most)
    return min(plans, key=lambda plan: _cost(gpu, outputs, k, plan), default=None)


def fused_plan(gpu: Machine, outputs: Sequence[int], k: int, element_size: int) -> SparsePlan | None:
    """The same for a product whose blocks select for themselves, with pieces of memory of other widths if need be."""
    plan = alone_plan(gpu, outputs, k, element_size)
    return plan or _widest(gpu, outputs, k, element_size, most=1.0)


def above_plan(
    gpu: Machine, outputs: Sequence[int], width: int, element_size: int, *, swiglu: bool, carries: bool
) -> SparsePlan | None:
    """The same for a product whose blocks compare for themselves what is above a threshold.

    Each has room for its part of all `width` entries. How many will be above nobody knows: the plan is that of half.
    """
    if not swiglu:
        plans = _fitting(gpu, outputs, width, _plans(gpu, element_size, _LANES), most=1.0)
        plan = min(plans, key=lambda plan: _cost(gpu, outputs, width // 2, plan), default=None)
        if plan or carries:
            return plan
    return _widest(gpu, [sum(outputs)] if swiglu else outputs, width, element_size, most=1.0)


def swiglu_plan(gpu: Machine, outputs: int, k: int, element_size: int) -> SparsePlan | None:
    """The same for gate and up with so many outputs together, whose product takes longest.

    A few multiprocessors are left to the selection that comes next, which has one to itself.
    """
    return _widest(gpu, [outputs], k, element_size, most=_LEAVING)


def low_bit_plan(gpu: Machine, outputs: Sequence[int], k: int, width: int, selected: int = 0) -> SparsePlan | None:
    """The same for codes, `width` of them in 16 bytes: blocks have a multiprocessor each, and as many as can work.

    Args:
        gpu: for its number of multiprocessors, and whether it has clusters.
        outputs: of each matrix.
        k: entries of the list.
        width: codes in 16 bytes.
        selected: entries that blocks have room for which select for themselves. None is the result where they have not,
            or are more than there are multiprocessors.
    """
    clusters = _CLUSTERS if gpu.overlaps else (1,)
    plans = [SparsePlan(tile // width, cluster, tile) for tile in _CODE_TILES for cluster in clusters]
    if selected:
        plans = [
            plan
            for plan in plans
            if _CODES_ROOM + 8 * selected // plan.cluster <= gpu.shared_memory and _blocks(gpu, outputs, plan) <= 1.0
        ]
    return min(plans, key=lambda plan: _low_bit_cost(gpu, outputs, k, plan), default=None)


def _low_bit_cost(gpu: Machine, outputs: Sequence[int], k: int, plan: SparsePlan) -> float:
    """What a plan costs, in parts of the best."""
    blocks = _blocks(gpu, outputs, plan)
    rounds = math.ceil(blocks / _AT_ONCE[plan.cluster])
    idle = max(rounds / blocks * _NEARLY, 1.0)
    loads = max(k // plan.cluster // (SPARSE_THREADS // plan.lanes), 1)
    few = max(1.0, plan.loads / loads)
    narrow = 0.6 / plan.lanes  # pieces of memory
    return few * (idle + 0.02 * (rounds - 1) + 0.01 * plan.cluster + narrow)


def _widest(gpu: Machine, outputs: Sequence[int], k: int, element_size: int, most: float) -> SparsePlan | None:
    """Of plans with pieces of any multiple of 32 bytes a side, the widest of those with blocks for nearly all."""
    plans = _fitting(gpu, outputs, k, _plans(gpu, element_size, range(64, 4, -4)), most)
    return min(plans, key=lambda plan: (-min(_blocks(gpu, outputs, plan), _NEARLY), -plan.lanes), default=None)


def _fitting(
    gpu: Machine, outputs: Sequence[int], listed: int, plans: Iterable[SparsePlan], most: float
) -> Iterator[SparsePlan]:
    for plan in plans:
        room = _FUSED_ROOM + 8 * listed // plan.cluster <= gpu.shared_memory
        if room and plan.cluster <= 2 and _ENOUGH <= _blocks(gpu, outputs, plan) <= most:
            yield plan


def _plans(gpu: Machine, element_size: int, lanes: Iterable[int]) -> list[SparsePlan]:
    clusters = _CLUSTERS if gpu.overlaps else (1,)
    width = 16 // element_size
    return [
        SparsePlan(number, cluster, number * width)
        for number in lanes
        for cluster in clusters
        if number * width <= SPARSE_THREADS
    ]


def _blocks(gpu: Machine, outputs: Sequence[int], plan: SparsePlan) -> float:
    """A multiprocessor, on the average."""
    tiles = sum(-(-size // plan.tile) for size in outputs)
    return tiles * plan.cluster / gpu.multiprocessors


def _cost(gpu: Machine, outputs: Sequence[int], k: int, plan: SparsePlan) -> float:
    """What a plan costs, in parts of the best."""
    blocks = _blocks(gpu, outputs, plan)
    loads = max(k // plan.cluster // (SPARSE_THREADS // plan.lanes), 1)
    few = max(1.0, _LOADS / loads)  # loads do not fill the memory system
    reading = min(blocks / _ENOUGH, 1.0)  # too few blocks leave memory idle
    waiting = 0.05 * max(blocks - 1.75, 0.0)  # each one takes in its list before it reads
    # A cluster lies within one group of multiprocessors: beyond one block each, large ones leave some of them empty.
    crowded = {1: 0.0, 2: 0.01, 4: 0.04, 8: 0.015}[plan.cluster] + (0.12 if blocks > 1 and plan.cluster > 2 else 0.0)
    narrow = {32: 0.02, 16: 0.0, 8: 0.012 * k / 1000}[plan.lanes]  # pieces of memory: 512, 256 or 128 bytes
    return few * (1.0 / max(reading, 0.01) + waiting + crowded + narrow)


def together(width: int) -> int:
    """How many rows at most read their weights together, of which a thread has so many in 16 bytes."""
    return min(_TOGETHER, _SUMS // width)


@dataclass(frozen=True)
class LinearPlan:
    """Blocks of `threads` take `tile` outputs at a time, with `chunk` entries of each row in shared memory."""

    threads: int
    tile: int
    chunk: int
    resident: int  # blocks that a multiprocessor holds at once

    def blocks(self, gpu: Machine, tiles: int) -> int:
        """How many share the tiles of a product."""
        return min(tiles, self.resident * gpu.multiprocessors)


def linear_plan(gpu: Machine, rows: int) -> LinearPlan:
    """For a dense product by rows of a matrix, of so many vectors that read it together."""
    if rows == 1:
        return LinearPlan(256, 16, 8192, 3)
    room = min(gpu.shared_memory, 128 * 1024) // (4 * rows)
    return LinearPlan(512, 64, room // 1024 * 1024, 1)


@dataclass(frozen=True)
class AttendPlan:
    """`heads` query heads share a reading of the cache, `cluster` blocks share its positions."""

    heads: int
    cluster: int


def attend_plan(gpu: Machine, query_heads: int, key_heads: int, length: int) -> AttendPlan:
    """Blocks for nearly all multiprocessors where the heads allow it, then as few readings of the cache as that leaves.

    Args:
        gpu: for its number of multiprocessors, and whether it has clusters.
        query_heads: of the layer.
        key_heads: of the layer.
        length: positions the cache holds.
    """
    group = query_heads // key_heads
    shared = [heads for heads in range(min(group, 8), 0, -1) if group % heads == 0]
    cluster = next((c for c in reversed(_CLUSTERS) if c * 32 <= length), 1) if gpu.overlaps else 1
    enough = 0.9 * gpu.multiprocessors
    heads = next((h for h in shared if query_heads // h * cluster >= enough), 1)
    return AttendPlan(heads, cluster)
