"""Attention over the cache."""

from __future__ import annotations

from ctypes import c_int

import torch

from larosa.errors import LarosaError
from larosa.ops import checks
from larosa.ops.cuda import launch
from larosa.ops.cuda.parameters import TYPE_NAMES, Rotary, Vector, address
from larosa.ops.cuda.plan import ATTEND_THREADS, attend_plan

_MOST_ATTENDING = 8  # rows, of which each block may make the keys and values of all


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    eps: float,
    scale: float,
    window: int,
    scales: torch.Tensor | None = None,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attend_reference`. A position outside the cache gives NaN and leaves the cache as it is.

    Positions, caches, and keys and values of earlier steps, are read early: neither of the two kernels launched just
    before may write them.

    Raises:
        LarosaError: a head is no multiple of 16 bytes in the cache's dtype, or larger than 512.
    """
    query_heads = checks.attention(qkv, keys, values, position, (cos, sin), scales, cache)
    key_heads, length, size = keys.shape[-3:]
    pieces, rest = divmod(size * keys.element_size(), 16)
    if rest or pieces > 32 or (keys.data_ptr() | values.data_ptr()) % 16:
        raise LarosaError(
            f"the CUDA kernels attend with heads of 16 to 512 bytes in steps of 16, not of {size} "
            f"{str(keys.dtype).removeprefix('torch.')} entries: set LAROSA_CUDA_KERNELS=triton"
        )
    rows = len(qkv)
    if rows > _MOST_ATTENDING:
        raise ValueError(f"attend takes up to {_MOST_ATTENDING} rows, not {rows}")
    result = qkv.new_empty(rows, query_heads * size)
    plan = attend_plan(launch.machine(qkv.device), query_heads, key_heads, length)
    gains = Vector.of("q_gain", q_gain, size), Vector.of("k_gain", k_gain, size)
    rotary = Rotary(address(cos), address(sin), *gains, eps, scale)
    macros = {
        "CACHE": "Int8" if keys.dtype == torch.int8 else TYPE_NAMES[keys.dtype],
        "SIZE": str(size),
        "HEADS": str(plan.heads),
        "CLUSTER": str(plan.cluster),
        "THREADS": str(ATTEND_THREADS),
        "ROWS": str(rows),
    }
    addresses = (address(tensor) for tensor in (qkv, keys, values, scales, position, cache))
    caches = c_int(1 if cache is None else len(keys))
    sizes = (c_int(number) for number in (length, query_heads, key_heads, window))
    grid = launch.Grid(query_heads // plan.heads * plan.cluster, rows, ATTEND_THREADS, plan.cluster)
    launch.run(qkv, "attend.cu", "attend", macros, grid, (*addresses, caches, rotary, *sizes, address(result)))
    return result
