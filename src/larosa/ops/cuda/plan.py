"""How a product or an attention is divided over a GPU: found from sizes alone, so that it is the same on every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from larosa.ops.cuda.launch import Machine

THREADS = 256  # of a block, in linear.cu, sparse_linear.cu and attend.cu
LINEAR_TILE = 16  # TILE in linear.cu
_RESIDENT = 3  # blocks of these kernels that a multiprocessor holds at once
_LOADS = 8  # DEPTH in sparse_linear.cu: fewer loads a thread do not fill the memory system
_ENOUGH = 0.6  # of the places for blocks
_CLUSTERS = (8, 4, 2, 1)  # 8 blocks is what every GPU with clusters grants
#: Blocks a multiprocessor, on the average, up to which clusters of a size find room together. A cluster lies within one
#: group of multiprocessors, so that the larger it is, the more places stay empty; a second round costs more.
_ROOM = {1: 3.0, 2: 3.0, 4: 2.65, 8: 2.0}


@dataclass(frozen=True)
class SparsePlan:
    """`lanes` threads side by side along the outputs, `cluster` blocks along the list of entries."""

    lanes: int
    cluster: int
    tile: int  # outputs of a cluster


def sparse_plan(gpu: Machine, outputs: Sequence[int], k: int, batch: int, element_size: int) -> SparsePlan:
    """As many blocks as run at once, each with enough to read, and wide pieces before narrow ones.

    All blocks must run at once: a second round would read with few of them, and each block then gets the same
    share of the bandwidth whichever multiprocessor it is on.

    Args:
        gpu: for its number of multiprocessors, and whether it has clusters.
        outputs: of each matrix.
        k: entries of the list.
        batch: vectors.
        element_size: bytes of a weight.
    """
    width = 16 // element_size
    at_once = _RESIDENT * gpu.multiprocessors
    best, best_worth = SparsePlan(32, 1, 32 * width), 0.0
    for lanes in (32, 16, 8):
        tiles = sum(-(-size // (lanes * width)) for size in outputs)
        for cluster in _CLUSTERS if gpu.overlaps else (1,):
            blocks = max(tiles * cluster * batch, 1)
            if blocks > _ROOM[cluster] * gpu.multiprocessors:
                continue
            loads = max(k // cluster // (THREADS // lanes), 1)
            filled = blocks / at_once * min(1.0, loads / _LOADS)
            # Beyond _ENOUGH more blocks hardly help, and wide pieces of memory, which come first, help more.
            worth = min(filled, _ENOUGH) + 0.01 * filled
            if worth > best_worth * 1.02:
                best, best_worth = SparsePlan(lanes, cluster, lanes * width), worth
    return best


def linear_blocks(gpu: Machine, tiles: int) -> int:
    """How many blocks share the tiles of a dense product."""
    return min(tiles, _RESIDENT * gpu.multiprocessors)


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
    cluster = next((c for c in _CLUSTERS if c * 32 <= length), 1) if gpu.overlaps else 1
    enough = 0.9 * gpu.multiprocessors
    heads = next((h for h in shared if query_heads // h * cluster >= enough), 1)
    return AttendPlan(heads, cluster)
