"""Exact Top-K of one vector by one program, or what is above a threshold, with what produces the vector."""

from __future__ import annotations

from ctypes import c_float

import torch
import triton
import triton.language as tl

from larosa.ops import checks
from larosa.ops.select import CountedSelection, Selection, columns_each

_AS_IS, _NORMED, _GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NAN_KEY = tl.constexpr(0x7F800001)  # all NaN alike, above infinity


def top_k(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """See `top_k_reference`."""
    _, width = checks.vectors("x", x)
    return _select(_AS_IS, x, width, k, score)


def rms_norm_top_k(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None = None
) -> Selection:
    """See `rms_norm_top_k_reference`."""
    _, width = checks.vectors("x", x)
    return _select(_NORMED, x, width, k, score, gain, eps)


def silu_mul_top_k(gate_up: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """See `silu_mul_top_k_reference`."""
    return _select(_GATED, gate_up, checks.halves("gate_up", gate_up), k, score)


def above(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    """See `above_reference`."""
    _, width = checks.vectors("x", x)
    return _compare(_AS_IS, x, width, threshold, score)


def rms_norm_above(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None = None
) -> CountedSelection:
    """See `rms_norm_above_reference`."""
    _, width = checks.vectors("x", x)
    return _compare(_NORMED, x, width, threshold, score, gain, eps)


def silu_mul_above(gate_up: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    """See `silu_mul_above_reference`."""
    return _compare(_GATED, gate_up, checks.halves("gate_up", gate_up), threshold, score)


def _select(
    source: tl.constexpr,
    x: torch.Tensor,
    width: int,
    k: int,
    score: torch.Tensor | None,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> Selection:
    checks.kept(k, width)
    checks.vector("gain", gain, width)
    checks.vector("score", score, width)
    values, indices = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int32)
    if len(x) and k:
        block = triton.next_power_of_2(width)
        _select_kernel[(len(x),)](
            x, gain, score, values, indices, width, k, eps, source, block, num_warps=_warps(block)
        )
    return values, indices


def _compare(
    source: tl.constexpr,
    x: torch.Tensor,
    width: int,
    threshold: float,
    score: torch.Tensor | None,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> CountedSelection:
    each = 1 if score is None else columns_each(score, width)
    checks.vector("gain", gain, width)
    checks.vector("score", score, each * width)
    values, indices = x.new_empty(len(x), each * width), x.new_empty(len(x), each * width, dtype=torch.int32)
    count = x.new_empty(len(x), dtype=torch.int64)
    threshold = c_float(threshold).value  # which Triton's interpreter would compare as it is
    block = triton.next_power_of_2(width)
    if len(x):
        _compare_kernel[(len(x),)](
            *(x, gain, score, values, indices, count, width, threshold, eps, source, each, block),
            num_warps=_warps(block),
        )
    return values, indices, count


def _warps(block: int) -> int:
    return min(32, max(4, block // 512))


@triton.jit
def _activation(x_ptr, gain_ptr, row, at, there, width, eps, SOURCE: tl.constexpr):
    if SOURCE == _GATED:
        gate = tl.load(x_ptr + row * 2 * width + at, mask=there, other=0.0)
        up = tl.load(x_ptr + row * 2 * width + width + at, mask=there, other=0.0)
        x = gate / (1.0 + tl.exp(-gate)) * up
    else:
        x = tl.load(x_ptr + row * width + at, mask=there, other=0.0)
    if SOURCE == _NORMED:
        x *= 1.0 / tl.sqrt_rn(tl.sum(x * x) / width + eps)
        if gain_ptr is not None:
            x *= tl.load(gain_ptr + at, mask=there, other=0.0).to(tl.float32)
    return x


@triton.jit
def _select_kernel(
    x_ptr, gain_ptr, score_ptr, values_ptr, indices_ptr, width, k, eps, SOURCE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    there = at < width
    x = _activation(x_ptr, gain_ptr, row, at, there, width, eps, SOURCE)
    weighted = x
    if score_ptr is not None:
        weighted = x * tl.load(score_ptr + at, mask=there, other=0.0).to(tl.float32)
    # The bits of a magnitude, read as an integer, sort like the magnitude; what is not there comes last.
    key = tl.minimum(weighted.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _NAN_KEY)
    key = tl.where(there, key, -1)

    # The k-th largest key, bit by bit from the highest.
    threshold = tl.full((), 0, tl.int32)
    for i in range(31):
        candidate = threshold | (1 << (30 - i))
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32)) >= k, candidate, threshold)
    larger = key > threshold
    tied = key == threshold
    room = k - tl.sum(larger.to(tl.int32))
    kept = larger | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    place = row * k + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(values_ptr + place, x, mask=kept)
    tl.store(indices_ptr + place, at, mask=kept)


@triton.jit
def _compare_kernel(
    x_ptr,
    gain_ptr,
    score_ptr,
    values_ptr,
    indices_ptr,
    count_ptr,
    width,
    threshold,
    eps,
    SOURCE: tl.constexpr,
    COLUMNS_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    there = at < width
    x = _activation(x_ptr, gain_ptr, row, at, there, width, eps, SOURCE)
    total = 0
    for column in tl.static_range(COLUMNS_EACH):
        total += tl.sum(_kept(x, score_ptr, column * width + at, there, threshold).to(tl.int32))
    # Zeros stand behind those that are kept: what is dropped goes there.
    first = row * width * COLUMNS_EACH
    before = 0  # kept of columns in front of these
    for column in tl.static_range(COLUMNS_EACH):
        index = column * width + at
        kept = _kept(x, score_ptr, index, there, threshold)
        up_to = before + tl.cumsum(kept.to(tl.int32), 0)
        place = first + tl.where(kept, up_to - 1, total + index - up_to)
        tl.store(values_ptr + place, tl.where(kept, x, 0.0), mask=there)
        tl.store(indices_ptr + place, tl.where(kept, index, 0), mask=there)
        before += tl.sum(kept.to(tl.int32))
    tl.store(count_ptr + row, total)


@triton.jit
def _kept(x, score_ptr, index, there, threshold):
    weighted = x
    if score_ptr is not None:
        weighted = x * tl.load(score_ptr + index, mask=there, other=0.0).to(tl.float32)
    # NaN is above: it is not equal to itself.
    return there & ((tl.abs(weighted) > threshold) | (weighted != weighted))
