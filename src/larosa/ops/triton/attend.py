"""Attention of a position a row over its cache: prepare heads, attend in parts of the positions, merge the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from larosa.ops import checks

_PART = 256  # positions a program attends to
_STEP = 32  # at a time


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
    """See `attend_reference`. A position outside the cache gives NaN and leaves the cache as it is."""
    query_heads = checks.attention(qkv, keys, values, position, (cos, sin), scales, cache)
    key_heads, length, size = keys.shape[-3:]
    rows, caches = len(qkv), 1 if cache is None else len(keys)
    checks.vector("q_gain", q_gain, size)
    checks.vector("k_gain", k_gain, size)
    block = triton.next_power_of_2(size)
    parts = triton.cdiv(min(window, length) if window else length, _PART)
    queries, result = qkv.new_empty(rows, query_heads, size), qkv.new_empty(rows, query_heads * size)
    partial = qkv.new_empty(rows, query_heads, parts, size + 2)  # weighted values, maximum, sum
    if not rows:
        return result
    _prepare_kernel[(query_heads + 2 * key_heads, rows)](
        *(qkv, queries, keys, values, scales, position, cache, cos, sin, q_gain, k_gain),
        *(eps, scale, length, caches, query_heads, key_heads, size, block),
    )
    _part_kernel[(query_heads, parts, rows)](
        *(queries, keys, values, scales, position, cache, partial),
        *(length, caches, key_heads, query_heads // key_heads, window, size, _PART, _STEP, block),
    )
    _merge_kernel[(query_heads, rows)](partial, result, parts, size, triton.next_power_of_2(parts), block)
    return result


@triton.jit
def _place(position_ptr, cache_ptr, row, length, caches):
    """A row's position, its cache, and whether there are both."""
    position = tl.load(position_ptr + row)
    cache = tl.full((), 0, tl.int64)
    if cache_ptr is not None:
        cache = tl.load(cache_ptr + row)
    inside = (position >= 0) & (position < length) & (cache >= 0) & (cache < caches)
    return position, tl.where(inside, cache, 0), inside


@triton.jit
def _prepare_kernel(
    qkv_ptr,
    queries_ptr,
    keys_ptr,
    values_ptr,
    scales_ptr,
    position_ptr,
    cache_ptr,
    cos_ptr,
    sin_ptr,
    q_gain_ptr,
    k_gain_ptr,
    eps,
    scale,
    length,
    caches,
    query_heads,
    key_heads,
    size,
    BLOCK: tl.constexpr,
):
    """One head: queries are normed, rotated and scaled, keys normed and rotated, and with values put in the cache."""
    head, vector = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position, cache, inside = _place(position_ptr, cache_ptr, vector, length, caches)
    qkv_ptr += vector * (query_heads + 2 * key_heads) * size
    queries_ptr += vector * query_heads * size
    first = cache * key_heads
    i = tl.arange(0, BLOCK)
    there = i < size
    half = size // 2
    partner = tl.where(i < half, i + half, i - half)  # what rotation mixes in
    x = tl.load(qkv_ptr + head * size + i, mask=there, other=0.0)
    turned = tl.load(qkv_ptr + head * size + partner, mask=there, other=0.0)
    turned = tl.where(i < half, -turned, turned)
    if head < query_heads + key_heads:
        is_query = head < query_heads
        inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x) / size + eps)
        if q_gain_ptr is not None:
            if is_query:
                x *= inverse * tl.load(q_gain_ptr + i, mask=there, other=0.0).to(tl.float32)
                turned *= inverse * tl.load(q_gain_ptr + partner, mask=there, other=0.0).to(tl.float32)
        if k_gain_ptr is not None:
            if not is_query:
                x *= inverse * tl.load(k_gain_ptr + i, mask=there, other=0.0).to(tl.float32)
                turned *= inverse * tl.load(k_gain_ptr + partner, mask=there, other=0.0).to(tl.float32)
        if cos_ptr is not None:
            cos = tl.load(cos_ptr + position * size + i, mask=there & inside, other=0.0)
            sin = tl.load(sin_ptr + position * size + i, mask=there & inside, other=0.0)
            x = x * cos + turned * sin
        if is_query:
            tl.store(queries_ptr + head * size + i, x * scale, mask=there)
        else:
            row = (first + head - query_heads) * length + position
            if scales_ptr is not None:
                x = _digits(tl.where(there, x, 0.0), scales_ptr + 2 * row, inside)
            tl.store(keys_ptr + row * size + i, x.to(keys_ptr.dtype.element_ty), mask=there & inside)
    else:
        row = (first + head - query_heads - key_heads) * length + position
        if scales_ptr is not None:
            x = _digits(x, scales_ptr + 2 * row + 1, inside)
        tl.store(values_ptr + row * size + i, x.to(values_ptr.dtype.element_ty), mask=there & inside)


@triton.jit
def _digits(x, scale_ptr, inside):
    """Rounded to 8 bits, as `larosa.formats.keys_values.round_vectors` does it; the scale is stored."""
    largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True))  # NaN's bits are above infinity's
    scale = (largest.to(tl.float32, bitcast=True) / 127.0).to(tl.bfloat16)
    tl.store(scale_ptr, scale, mask=inside)
    wide = scale.to(tl.float32)
    rounded = x * tl.where(wide > 1e-37, 1.0 / wide, 0.0)
    rounded = (rounded + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no places behind the point
    return tl.where((wide > 1e-37) & (wide < float("inf")), tl.minimum(tl.maximum(rounded, -127.0), 127.0), 0.0)


@triton.jit
def _part_kernel(
    queries_ptr,
    keys_ptr,
    values_ptr,
    scales_ptr,
    position_ptr,
    cache_ptr,
    partial_ptr,
    length,
    caches,
    key_heads,
    group,
    window,
    size,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query head and one part of the positions: a running softmax."""
    head, part, vector = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position, cache, inside = _place(position_ptr, cache_ptr, vector, length, caches)
    position = tl.where(inside, position, -1)
    head_of_all = vector * tl.num_programs(0) + head
    start = tl.where(window > 0, tl.maximum(position + 1 - window, 0), 0)
    begin = start + part * PART
    end = tl.minimum(begin + PART, position + 1)
    i = tl.arange(0, BLOCK)
    there = i < size
    query = tl.load(queries_ptr + head_of_all * size + i, mask=there, other=0.0)
    cache = (cache * key_heads + head // group) * length
    maximum = -float("inf")
    total = 0.0
    weighted = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, PART, STEP):
        at = begin + step + tl.arange(0, STEP)
        seen = at < end
        place = (cache + at)[:, None] * size + i[None, :]
        mask = seen[:, None] & there[None, :]
        key = tl.load(keys_ptr + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(key * query[None, :], 1)
        if scales_ptr is not None:
            scale = scales_ptr + 2 * (cache + at)
            score *= tl.load(scale, mask=seen, other=0.0).to(tl.float32)
            value *= tl.load(scale + 1, mask=seen, other=0.0).to(tl.float32)[:, None]
        score = tl.where(seen, score, -float("inf"))
        larger = tl.maximum(maximum, tl.max(score))
        old = tl.where(maximum == -float("inf"), 0.0, tl.exp(maximum - larger))
        weight = tl.where(score == -float("inf"), 0.0, tl.exp(score - larger))
        total = total * old + tl.sum(weight)
        weighted = weighted * old + tl.sum(weight[:, None] * value, 0)
        maximum = larger
    out = partial_ptr + (head_of_all * tl.num_programs(1) + part) * (size + 2)
    tl.store(out + i, weighted, mask=there)
    tl.store(out + size, maximum)
    tl.store(out + size + 1, total)


@triton.jit
def _merge_kernel(partial_ptr, result_ptr, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    part = tl.arange(0, PARTS)
    i = tl.arange(0, BLOCK)
    there = i < size
    rows = partial_ptr + (head * parts + part) * (size + 2)
    maximum = tl.load(rows + size, mask=part < parts, other=-float("inf"))
    total = tl.load(rows + size + 1, mask=part < parts, other=0.0)
    scale = tl.where(maximum == -float("inf"), 0.0, tl.exp(maximum - tl.max(maximum)))
    weighted = tl.load(rows[:, None] + i[None, :], mask=(part < parts)[:, None] & there[None, :], other=0.0)
    result = tl.sum(scale[:, None] * weighted, 0) / tl.sum(scale * total)
    tl.store(result_ptr + head * size + i, result, mask=there)
