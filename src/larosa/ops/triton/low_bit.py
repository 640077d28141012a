"""Products with columns of codes, and with what selects from their vectors: launches one after the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from larosa.formats import FORMATS
from larosa.ops import checks
from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import LowBitWeights
from larosa.ops.triton.linear import adapted, finish_parts
from larosa.ops.triton.norm import rms_norm, silu_mul
from larosa.ops.triton.select import above, rms_norm_above, rms_norm_top_k, top_k

_OUTPUTS, _ENTRIES = 256, 16  # of a tile: outputs, entries at a time
_PART = 256  # entries of the list that a program takes


def low_bit_linear(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    codes: Weights,
    scales: Weights,
    outputs: list[int],
    group: int,
    form: str,
    biases: Biases,
    residual: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `low_bit_linear_reference`."""
    depth = len(codes[0]) if codes else 0
    rows, k, each = checks.listed_columns(values, indices, depth)
    checks.counts(count, rows)
    total = checks.low_bit(LowBitWeights(codes, scales, outputs, group, form), biases, depth)
    checks.residual(residual, adapter, rows, total, None, adapter_scale)
    if residual is not None and adapter is not None:
        residual = adapted(residual, adapter, adapter_scale)
    parts = triton.cdiv(k, _PART)
    partial = values.new_empty(parts, rows, total)
    result = values.new_empty(rows, total)
    first = 0
    for matrix, scale, size, bias in zip(codes, scales, outputs, biases, strict=True):
        if rows and size:
            if parts:
                _low_bit_kernel[(triton.cdiv(size, _OUTPUTS), parts, rows)](
                    *(values, indices, count, matrix, scale, partial, first, size, total, k),
                    *(matrix.stride(0), scale.stride(0), each, FORMATS[form].bits, group, _PART, _OUTPUTS, _ENTRIES),
                )
            finish_parts(partial, count, bias, residual, result, first, size, k, _PART)
        first += size
    return result


def low_bit_site(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float | None,
    score: torch.Tensor | None,
    k: int | None,
    threshold: float | None,
    swiglu: bool,
    codes: Weights,
    scales: Weights,
    outputs: list[int],
    group: int,
    form: str,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `low_bit_site_reference`."""
    checks.site(k, threshold, eps, swiglu, outputs, residual, adapter)
    checks.site_columns(x, len(codes[0]) if codes else 0, k, threshold, score)
    indices, count = None, None
    if k is not None:
        x, indices = top_k(x, k, score) if eps is None else rms_norm_top_k(x, gain, eps, k, score)
    elif threshold is not None:
        found = above(x, threshold, score) if eps is None else rms_norm_above(x, gain, eps, threshold, score)
        x, indices, count = found
    elif eps is not None:
        x = rms_norm(x, gain, eps)
    weights = codes, scales, outputs, group, form, biases
    result = low_bit_linear(x, indices, *weights, residual, count, adapter, adapter_scale)
    return silu_mul(result) if swiglu else result


@triton.jit
def _low_bit_kernel(
    values_ptr,
    indices_ptr,
    count_ptr,
    codes_ptr,
    scales_ptr,
    partial_ptr,
    first,
    size,
    outputs,
    k,
    stride,
    scale_stride,
    COLUMNS_EACH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    part, vector = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = output < size
    given = k // COLUMNS_EACH  # values of a vector
    count = k if count_ptr is None else tl.minimum(tl.load(count_ptr + vector), k)
    if part * PART >= count:
        return
    total = tl.zeros((ENTRIES, OUTPUTS), tl.float32)
    for start in range(0, PART, ENTRIES):
        entry = part * PART + start + tl.arange(0, ENTRIES)
        listed = entry < count
        there = listed[:, None] & exists[None, :]
        place = entry if COLUMNS_EACH == 1 else entry % given
        value = tl.load(values_ptr + vector * given + place, mask=listed, other=0.0)
        if indices_ptr is None:
            index = entry.to(tl.int64)
        else:
            index = tl.load(indices_ptr + vector * k + entry, mask=listed, other=0).to(tl.int64)
        scale = tl.load(scales_ptr + index[:, None] * scale_stride + (output // GROUP)[None, :], mask=there, other=0.0)
        column = codes_ptr + index[:, None] * stride
        if BITS == 8:
            code = tl.load(column + output[None, :], mask=there, other=0)
        elif BITS == 4:
            pair = tl.load(column + (output // 2)[None, :], mask=there, other=0)
            code = ((pair.to(tl.int32) >> (output % 2 * 4)[None, :]) & 15) - 8
        else:  # as `LeadingBits` has them
            LEADING: tl.constexpr = BITS - 4
            byte = output % 32 // 2
            piece = column + (output // 32 * (4 * BITS))[None, :]
            pair = tl.load(piece + byte[None, :], mask=there, other=0).to(tl.int32)
            packed = tl.load(piece + (16 + byte % (4 * LEADING))[None, :], mask=there, other=0).to(tl.int32)
            place = byte // (4 * LEADING) * 2 * LEADING + output % 2 * LEADING
            high = (packed >> place[None, :]) & ((1 << LEADING) - 1)
            code = ((pair >> (output % 2 * 4)[None, :]) & 15 | high << 4) - (8 << LEADING)
        total += (value[:, None] * scale.to(tl.float32)) * code.to(tl.float32)
    rows = tl.num_programs(2)
    tl.store(partial_ptr + (part * rows + vector) * outputs + first + output, tl.sum(total, 0), mask=exists)
