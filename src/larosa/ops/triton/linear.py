"""Products with dense and with sparse vectors.

A sparse product is divided over tiles of outputs and over parts of the list. The parts' sums go to memory and are
added in their order by a second kernel, so that the same input gives the same bits. Of a list that is counted, parts
behind the last entry are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from larosa.formats.adapters import HIGH
from larosa.ops import checks
from larosa.ops.linear import Biases, Weights

_ROWS, _STEP = 8, 512  # of a dense tile: outputs, inputs at a time
_OUTPUTS, _ENTRIES = 256, 16  # of a sparse tile: outputs, entries at a time
_PART = 256  # entries of the list that a program takes
_SUM = 1024  # outputs a program of the second kernel finishes


def linear(x: torch.Tensor, weights: Weights, biases: Biases, residual: torch.Tensor | None = None) -> torch.Tensor:
    """See `linear_reference`; the weights are row-major."""
    rows, width = checks.vectors("x", x)
    outputs = checks.matrices(weights, biases, width, column_major=False)
    checks.residual(residual, None, rows, outputs)
    result = x.new_empty(rows, outputs)
    first = 0
    for weight, bias in zip(weights, biases, strict=True):
        size = len(weight)
        if rows and size:
            _linear_kernel[(triton.cdiv(size, _ROWS), rows)](
                x, weight, bias, residual, result, first, size, outputs, weight.stride(0), width, _ROWS, _STEP
            )
        first += size
    return result


def sparse_linear(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `sparse_linear_reference`; the matrices are column-major."""
    width = weights[0].shape[1] if weights else 0
    rows, _ = checks.listed(values, indices, width)
    checks.counts(count, rows)
    outputs = checks.matrices(weights, biases, width, column_major=True)
    checks.residual(residual, adapter, rows, outputs, weights[0].dtype, adapter_scale)
    if residual is not None and adapter is not None:
        residual = adapted(residual, adapter, adapter_scale)
    return _sparse_linear(values, indices, weights, biases, residual, count)


def adapted(residual: torch.Tensor, adapter: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What is added to a product: [B, N] float32."""
    width = residual.shape[1]
    columns = adapter.shape[1]
    if scale is not None:
        residual = torch.cat([residual, HIGH * residual[:, : columns - width]], dim=1)
    result = _sparse_linear(residual, None, [adapter], [None], None)
    return result if scale is None else result * scale.float()


def _sparse_linear(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    (rows, k), outputs = values.shape, sum(len(weight) for weight in weights)
    parts = triton.cdiv(k, _PART)
    partial = values.new_empty(parts, rows, outputs)
    result = values.new_empty(rows, outputs)
    first = 0
    for weight, bias in zip(weights, biases, strict=True):
        size = len(weight)
        if rows and size:
            if parts:
                _sparse_linear_kernel[(triton.cdiv(size, _OUTPUTS), parts, rows)](
                    *(values, indices, count, weight, partial, first, size, outputs, k, weight.stride(1)),
                    *(_PART, _OUTPUTS, _ENTRIES),
                )
            finish_parts(partial, count, bias, residual, result, first, size, k, _PART)
        first += size
    return result


def finish_parts(
    partial: torch.Tensor,
    count: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    result: torch.Tensor,
    first: int,
    size: int,
    k: int,
    part: int,
) -> None:
    """Write a matrix's `size` outputs, from `first` on, of sums [parts, B, N] over parts of a list of k entries."""
    parts, rows, outputs = partial.shape
    _sum_kernel[(triton.cdiv(size, _SUM), rows)](
        *(partial, count, bias, residual, result, first, size, outputs, rows * outputs),
        *(k, part, parts, _SUM),
    )


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    result_ptr,
    first,
    size,
    outputs,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    vector = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = output < size
    rows = weight_ptr + output.to(tl.int64)[:, None] * stride
    total = tl.zeros((ROWS, STEP), tl.float32)
    for start in range(0, WIDTH, STEP):
        at = start + tl.arange(0, STEP)
        x = tl.load(x_ptr + vector * WIDTH + at, mask=at < WIDTH, other=0.0)
        weights = tl.load(rows + at[None, :], mask=exists[:, None] & (at < WIDTH)[None, :], other=0.0)
        total += weights.to(tl.float32) * x[None, :]
    result = tl.sum(total, 1)
    place = vector * outputs + first + output
    if bias_ptr is not None:
        result += tl.load(bias_ptr + output, mask=exists, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        result += tl.load(residual_ptr + place, mask=exists, other=0.0)
    tl.store(result_ptr + place, result, mask=exists)


@triton.jit
def _sparse_linear_kernel(
    values_ptr,
    indices_ptr,
    count_ptr,
    weight_ptr,
    partial_ptr,
    first,
    size,
    outputs,
    k,
    stride,
    PART: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    part, vector = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = output < size
    count = k if count_ptr is None else tl.minimum(tl.load(count_ptr + vector), k)
    if part * PART >= count:
        return
    total = tl.zeros((ENTRIES, OUTPUTS), tl.float32)
    for start in range(0, PART, ENTRIES):
        entry = part * PART + start + tl.arange(0, ENTRIES)
        listed = entry < count
        value = tl.load(values_ptr + vector * k + entry, mask=listed, other=0.0)
        if indices_ptr is None:
            index = entry.to(tl.int64)
        else:
            index = tl.load(indices_ptr + vector * k + entry, mask=listed, other=0).to(tl.int64)
        columns = weight_ptr + index[:, None] * stride + output[None, :]
        weights = tl.load(columns, mask=listed[:, None] & exists[None, :], other=0.0)
        total += value[:, None] * weights.to(tl.float32)
    rows = tl.num_programs(2)
    tl.store(partial_ptr + (part * rows + vector) * outputs + first + output, tl.sum(total, 0), mask=exists)


@triton.jit
def _sum_kernel(
    partial_ptr,
    count_ptr,
    bias_ptr,
    residual_ptr,
    result_ptr,
    first,
    size,
    outputs,
    stride,
    k,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    vector = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = output < size
    place = vector * outputs + first + output
    total = tl.zeros((BLOCK,), tl.float32)
    count = k if count_ptr is None else tl.minimum(tl.load(count_ptr + vector), k)
    for part in range(PARTS):
        total += tl.load(partial_ptr + part * stride + place, mask=exists & (part * PART < count), other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=exists, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + place, mask=exists, other=0.0)
    tl.store(result_ptr + place, total, mask=exists)
