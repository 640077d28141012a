"""Products of a vector with weights of 4 to 8 bits, which stand by columns: all columns, or those that are kept."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from larosa.formats import FORMATS, ColumnFormat
from larosa.ops.linear import Biases, Weights, sparse_linear_reference
from larosa.ops.schema import define

#: Columns that follow each other in a product share the unit by which their activations are rounded.
BLOCK = 16

#: Blocks are added up in up to so many segments of at least so many columns.
_SEGMENTS, _SEGMENT = 4, 64

#: What the largest activation becomes, with codes of 4 bits and with longer ones: 8 are finer than a weight's 4 alone.
_LARGEST_OF_FOUR, _LARGEST = 127.0, 127.0 * 128
#: Magnitudes up to this count as nothing: the reciprocal of a smaller one would be too large for float32.
_NOTHING = 1e-30


class LowBitWeights(NamedTuple):
    """The matrices of one product, as `low_bit_linear` takes them."""

    codes: Weights
    scales: Weights
    outputs: list[int]
    group: int
    form: str


@define(
    "low_bit_linear(Tensor values, Tensor? indices, Tensor[] codes, Tensor[] scales, int[] outputs, int group, "
    "str form, Tensor?[] biases, Tensor? residual=None, Tensor? count=None, Tensor? adapter=None, "
    "Tensor? adapter_scale=None) -> Tensor"
)
def _low_bit_linear(
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
    return values.new_empty(len(values), sum(outputs))


def low_bit_linear_reference(
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
    """`linear` or `sparse_linear` by the weights that codes and scales stand for, with no rounding but that of sums.

    Args:
        values: [B, k], float32 (float64 for a reference); [B, D] where there are no indices.
        indices: [B, k] int32, ascending in each row: which columns the values are for; None for all columns.
        codes: one matrix [D, width] each, as the format has them. Columns may lie apart in memory. [m D, width] where
            an entry has m columns, whose sum its value is multiplied with: column c is of entry c % D.
        scales: [D, ceil(N_i / group)] bfloat16 each, likewise.
        outputs: N_i of each matrix.
        group: outputs of a column that share a scale, one of `GROUPS`.
        form: the format of all codes, a name of `FORMATS`.
        biases: one [N_i] or None a matrix.
        residual: [B, sum of N_i] like `values`, or None.
        count: [B] int64, how many of the k entries of each row are meant, the first ones; None for all.
        adapter: what the residual goes through first, as of `sparse_linear`; float of any dtype, or int8 with
            `adapter_scale`. For a GPU's kernels alone.
        adapter_scale: [sum of N_i] of any float dtype, or None.

    Returns:
        [B, sum of N_i] like `values`.
    """
    weights = [
        FORMATS[form](group).dequantize(matrix, scale, size, values.dtype).t()
        for matrix, scale, size in zip(codes, scales, outputs, strict=True)
    ]
    if indices is None:
        values, indices = _every_column(values, codes)
    return sparse_linear_reference(values, indices, weights, biases, residual, adapter, adapter_scale, count)


def low_bit_linear_in_integers(
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
) -> torch.Tensor:
    """What kernels compute, bit by bit: each `BLOCK` of columns in whole numbers, and the sum of blocks in float32.

    In a block, values times scales are rounded by one unit for each group of outputs: a 127th of the largest of them
    for codes of 4 bits, a 16,256th for longer ones. So an output is off by up to half a unit times the sum of |q| for
    each block. Where the largest is NaN or infinite, the group's outputs are NaN: whole numbers would hide it.

    Arguments and result are those of `low_bit_linear_reference`, in float32.
    """
    if indices is None:
        values, indices = _every_column(values, codes)
    meant = [values.shape[1]] * len(values) if count is None else count.tolist()
    rows = []
    for value, index, k in zip(values, indices.long(), meant, strict=True):
        value, index = value[:k], index[:k]
        parts = [
            _segments(value, matrix[index], scale[index].float(), FORMATS[form](group), size)
            + (0 if bias is None else bias.float())
            for matrix, scale, size, bias in zip(codes, scales, outputs, biases, strict=True)
        ]
        rows.append(torch.cat(parts))
    result = torch.stack([values.new_empty(sum(outputs)), *rows])[1:]  # a stack of nothing is an error
    return result if residual is None else result + residual


def _every_column(values: torch.Tensor, codes: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The list of all columns, of which entry d has d, d + D and so on."""
    columns = len(codes[0])
    values = values.repeat(1, columns // max(values.shape[1], 1))
    return values, torch.arange(columns, dtype=torch.int32, device=values.device).expand(values.shape)


def _segments(
    value: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, form: ColumnFormat, outputs: int
) -> torch.Tensor:
    """[outputs] for k values, codes [k, columns] and scales [k, groups] of their columns."""
    q = form.unpack(codes, outputs)
    blocks = [
        _block(value[at : at + BLOCK], q[at : at + BLOCK], scales[at : at + BLOCK], form)
        for at in range(0, len(value), BLOCK)
    ]
    segments = max(1, min(len(value) // _SEGMENT, _SEGMENTS))
    ends = [len(blocks) * segment // segments for segment in range(segments + 1)]
    sums = []
    for start, end in pairwise(ends):
        total = value.new_zeros(outputs)
        for block in blocks[start:end]:
            total = total + block
        sums.append(total)
    result = sums[0]
    for total in sums[1:]:
        result = result + total
    return result


def _block(value: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, form: ColumnFormat) -> torch.Tensor:
    """[N], the sum of up to `BLOCK` columns."""
    most, outputs = torch.tensor(_LARGEST_OF_FOUR if form.bits == 4 else _LARGEST), q.shape[1]
    scaled = value[:, None] * scales
    largest = scaled.abs().amax(dim=0)  # NaN where there is one
    counts = (largest > _NOTHING) & largest.isfinite()
    # Of tensors, for a Python number over a tensor is rounded twice.
    numbers = (scaled * torch.where(counts, most / largest, 0)).nan_to_num(0).round().int()
    unit = torch.where(largest.isfinite(), torch.where(counts, largest / most, 0), torch.nan)
    total = (numbers.repeat_interleave(form.group, dim=1)[:, :outputs] * q).sum(dim=0, dtype=torch.int32)
    return total.float() * unit.repeat_interleave(form.group)[:outputs]
