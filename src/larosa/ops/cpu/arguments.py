"""What an operator may be given on the CPU: checked, and packed as larosa_cpu.h has it.

The kernels follow bare pointers, so whatever could lead them astray is refused here, but for tensors on other
devices, which `larosa.ops.schema` has refused before. This runs a hundred times a token and more: each check is one
cheap call.
"""

from __future__ import annotations

import struct

import torch

from larosa.formats import SCALE_DTYPE
from larosa.ops import checks
from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import LowBitWeights
from larosa.ops.select import columns_each

#: `larosa_dtype`.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_VECTOR = struct.Struct("=2q")
_MATRIX = struct.Struct("=3q")  # and bias and scale, two vectors
_LOW_BIT = struct.Struct("=7q")  # and bias
_INT8 = 3
_NO_VECTOR = _VECTOR.pack(0, 0)


def activations(name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` [B, D] float32, in one piece."""
    if x.dtype != torch.float32 or x.dim() != 2:
        raise ValueError(f"{name} must be float32 [B, D], not {_of(x)}")
    return x.contiguous()


def selection(indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The indices of `values`, in one piece."""
    if indices.dtype != torch.int32 or indices.shape != values.shape:
        raise ValueError(f"indices must be int32 {list(values.shape)} like the values, not {_of(indices)}")
    return indices.contiguous()


def room(x: torch.Tensor, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices [B, k] to be written."""
    if not 0 <= k <= width:
        raise ValueError(f"cannot keep {k} of {width} entries")
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int32)


def vector(name: str, values: torch.Tensor | None, width: int) -> bytes:
    """`larosa_vector` of `values` [width], or of none."""
    if values is None:
        return _NO_VECTOR
    if values.dtype not in DTYPES or values.shape != (width,) or not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous [{width}] of {_names()}, not {_of(values)}")
    return _VECTOR.pack(values.data_ptr(), DTYPES[values.dtype])


def scores(score: torch.Tensor | None, width: int) -> tuple[bytes, int]:
    """`larosa_vector` of one score for each column of `width` entries, or of none, and how many columns they have."""
    columns = width if score is None else width * columns_each(score, width)
    return vector("score", score, columns), columns


def matrices(weights: Weights, biases: Biases, depth: int, *, column_major: bool) -> tuple[bytes, int]:
    """`larosa_matrix` of each weight [N_i, depth], and the sum of N_i."""
    packed: list[bytes] = []
    total = 0
    dtype = weights[0].dtype if weights else None
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dtype is not dtype or dtype not in DTYPES:
            raise ValueError(f"weights must be all of one dtype of {_names()}, not {_of(weight)}")
        outputs, width = weight.shape
        if width != depth:
            raise ValueError(f"weight {list(weight.shape)} does not take vectors of {depth} entries")
        if column_major:
            # The strides of a single row or column do not tell.
            if weight.stride() != (1, outputs) and not weight.t().is_contiguous():
                raise ValueError(
                    f"sparse_linear reads weights column by column: convert {_of(weight)} by larosa.ops.column_major"
                )
        elif not weight.is_contiguous():
            raise ValueError(f"linear reads weights row by row: make {_of(weight)} contiguous")
        packed += (_MATRIX.pack(weight.data_ptr(), DTYPES[dtype], outputs), vector("bias", bias, outputs), _NO_VECTOR)
        total += outputs
    if not packed:
        raise ValueError("no weights")
    return b"".join(packed), total


def low_bit(weights: LowBitWeights, biases: Biases, depth: int) -> tuple[bytes, int]:
    """`larosa_low_bit` of the codes and scales of each matrix of `depth` columns, and the sum of their outputs."""
    codes, scales, outputs, group, form = weights
    of = checks.column_format(form, group)
    packed: list[bytes] = []
    for matrix, scale, size, bias in zip(codes, scales, outputs, biases, strict=True):
        if matrix.dtype is not of.codes_dtype:
            raise ValueError(f"codes of {form} must be {_name(of.codes_dtype)}, not {_of(matrix)}")
        _by_columns("codes", matrix, depth, of.codes_width(size))
        if scale.dtype is not SCALE_DTYPE:
            raise ValueError(f"scales must be {_name(SCALE_DTYPE)}, not {_of(scale)}")
        _by_columns("scales", scale, depth, -(-size // group))
        strides = matrix.stride(0), scale.stride(0)
        packed += (
            _LOW_BIT.pack(matrix.data_ptr(), scale.data_ptr(), *strides, of.bits, group, size),
            vector("bias", bias, size),
        )
    if not packed:
        raise ValueError("no weights")
    return b"".join(packed), sum(outputs)


def _by_columns(name: str, x: torch.Tensor, depth: int, size: int) -> None:
    if x.shape != (depth, size) or (size > 1 and x.stride(1) != 1) or (depth > 1 and x.stride(0) < size):
        raise ValueError(f"{name} must be [{depth}, {size}], each column in one piece, not {_of(x)}")


def adapter(weight: torch.Tensor, scale: torch.Tensor, width: int) -> bytes:
    """`larosa_matrix` of an int8 weight [N, depth] for vectors of `width` entries, some of which have two digits."""
    if weight.dtype is not torch.int8 or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous int8 [N, D + leading], not {_of(weight)}")
    outputs, depth = weight.shape
    if not width <= depth <= 2 * width:
        raise ValueError(f"weight {list(weight.shape)} does not take vectors of {width} entries")
    return _MATRIX.pack(weight.data_ptr(), _INT8, outputs) + _NO_VECTOR + vector("scale", scale, outputs)


def residual(values: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor | None:
    """What is added to `out`, in one piece."""
    if values is None:
        return None
    if values.shape != out.shape:
        raise ValueError(f"residual {list(values.shape)} is not like the result {list(out.shape)}")
    return activations("residual", values)


def cache(
    keys: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None, numbers: torch.Tensor | None = None
) -> int:
    """`larosa_dtype` of keys and values [K, T, d], int8 with scales [K, T, 2] bfloat16; all are written in place.

    With the numbers of caches for rows these are [C, K, T, d] and [C, K, T, 2].
    """
    dimensions = "K, T, d" if numbers is None else "C, K, T, d"
    for name, tensor in (("keys", keys), ("values", values)):
        known = tensor.dtype in DTYPES if scales is None else tensor.dtype is torch.int8
        if not known or tensor.dtype is not keys.dtype:
            raise ValueError(f"{name} must be all of one dtype of {_names()}, or int8 with scales, not {_of(tensor)}")
        if tensor.dim() != 3 + (numbers is not None) or tensor.shape != keys.shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{dimensions}], keys and values alike, not {_of(tensor)}")
    if scales is None:
        return DTYPES[keys.dtype]
    shape = (*keys.shape[:-1], 2)
    if scales.dtype != torch.bfloat16 or scales.shape != shape or not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous bfloat16 {list(shape)}, not {_of(scales)}")
    return _INT8


def query_heads(qkv: torch.Tensor, keys: torch.Tensor) -> int:
    """H of `qkv` [B, (H + 2 K) d]."""
    shared, _, size = keys.shape[-3:]
    heads, rest = divmod(qkv.shape[1] - 2 * shared * size, size) if shared and size else (-1, 0)
    if heads < 0 or rest or heads % shared:
        raise ValueError(f"qkv {list(qkv.shape)} is not [B, (H + 2 K) d] of keys [K, T, d] = {list(keys.shape[-3:])}")
    return heads


def for_rows(name: str, numbers: torch.Tensor | None, rows: int) -> None:
    """Checks `numbers` [B] int64, one a row, if there are any."""
    if numbers is not None and (
        numbers.dtype != torch.int64 or numbers.shape != (rows,) or not numbers.is_contiguous()
    ):
        raise ValueError(f"{name} must be contiguous int64 [{rows}], one a row, not {_of(numbers)}")


def rotary(name: str, values: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor | None:
    """`cos` or `sin` [T, d] float32 of a cache, in one piece."""
    if values is None:
        return None
    _, capacity, size = keys.shape[-3:]
    if values.shape != (capacity, size) or size % 2:
        raise ValueError(f"{name} must be [{capacity}, {size}] and of even width, not {_of(values)}")
    return activations(name, values)


def _names() -> str:
    return ", ".join(map(_name, DTYPES))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of(x: torch.Tensor) -> str:
    order = "" if x.is_contiguous() else f" of strides {list(x.stride())}"
    return f"{_name(x.dtype)} {list(x.shape)}{order}"
