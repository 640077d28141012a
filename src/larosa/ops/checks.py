"""What kernels are told before they run: they trust devices, sizes and layouts, so these are looked at first.

`one_device` is for the operators of every device, the others for a GPU's. Each function raises ValueError where what it
looks at cannot be what the operator wants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from larosa.formats import FORMATS, GROUPS, SCALE_DTYPE, ColumnFormat

if TYPE_CHECKING:
    from larosa.ops.low_bit import LowBitWeights

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def one_device(operator: str, names: Iterable[str], arguments: Iterable[Any]) -> None:
    """The tensors among an operator's arguments: on one device, for a kernel follows their bare addresses.

    Args:
        operator: for the message, as are the names of its arguments.
        names: at least as many as arguments.
        arguments: tensors, lists of them, or anything else, which is passed over.
    """
    first: tuple[str, torch.device] | None = None
    for name, value in zip(names, arguments, strict=False):
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if first is None:
                first = name, tensor.device
            elif tensor.device != first[1]:
                raise ValueError(
                    f"larosa::{operator}: {first[0]} is on {first[1]} and {name} on {tensor.device}: "
                    "move all to one device"
                )


def vectors(name: str, x: torch.Tensor) -> tuple[int, int]:
    """Rows and width of activations: [B, D] float32, contiguous."""
    if x.dtype != torch.float32 or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 [B, D], not {x.dtype} of shape {tuple(x.shape)}")
    return len(x), x.shape[1]


def halves(name: str, x: torch.Tensor) -> int:
    """Width of each of two vectors side by side: [B, 2 D] float32, contiguous."""
    width, odd = divmod(vectors(name, x)[1], 2)
    if odd:
        raise ValueError(f"{name} of shape {tuple(x.shape)} is not two vectors side by side")
    return width


def vector(name: str, x: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """A gain, bias or score: [size], of any of the three formats, contiguous; or None."""
    if x is not None and (x.dtype not in FLOATS or x.shape != (size,) or not x.is_contiguous()):
        raise ValueError(
            f"{name} must be a contiguous float32, bfloat16 or float16 vector of {size} entries, "
            f"not {x.dtype} of shape {tuple(x.shape)}"
        )
    return x


def kept(k: int, width: int) -> None:
    """How many entries a selection keeps."""
    if not 0 <= k <= width:
        raise ValueError(f"cannot keep {k} of {width} entries")


def selection(values: torch.Tensor, indices: torch.Tensor) -> tuple[int, int]:
    """Rows and length of a list of entries."""
    if indices.dtype != torch.int32 or indices.shape != values.shape or not indices.is_contiguous():
        raise ValueError(f"indices must be contiguous int32 of shape {tuple(values.shape)}, like values")
    return vectors("values", values)


def listed(values: torch.Tensor, indices: torch.Tensor | None, width: int) -> tuple[int, int]:
    """The same of a list without indices, which has all `width` entries."""
    if indices is not None:
        return selection(values, indices)
    rows, entries = vectors("values", values)
    if entries != width:
        raise ValueError(f"without indices values must be [B, {width}], all of them, not {tuple(values.shape)}")
    return rows, entries


def listed_columns(values: torch.Tensor, indices: torch.Tensor | None, columns: int) -> tuple[int, int, int]:
    """Rows and length of a list of columns, and how many of them a value is for.

    One, unless there are no indices: of all columns an entry of `values` can have several.
    """
    if indices is not None:
        return *selection(values, indices), 1
    return len(values), columns, columns_each("without indices values", values, columns)


def columns_each(name: str, x: torch.Tensor, columns: int) -> int:
    """How many of so many columns each entry of vectors has."""
    width = vectors(name, x)[1]
    each, rest = divmod(columns, max(width, 1))
    if rest or (width and not each):
        raise ValueError(
            f"{name} must be [B, {columns}], or [B, {columns} / m] where an entry has m columns, not {tuple(x.shape)}"
        )
    return max(each, 1)


def counts(counts: torch.Tensor | None, rows: int) -> None:
    """How many entries of each row of a list are meant: [B] int64; or None."""
    if counts is not None and (counts.dtype != torch.int64 or counts.shape != (rows,) or not counts.is_contiguous()):
        raise ValueError(f"count must be int64 [{rows}], one a row, not {counts.dtype} {list(counts.shape)}")


def matrices(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], width: int, *, column_major: bool
) -> int:
    """Outputs of all matrices [N_i, width] together: one format, one layout, a bias or None for each."""
    if not weights or len(weights) != len(biases):
        raise ValueError(f"{len(weights)} weights with {len(biases)} biases")
    dtype = weights[0].dtype
    if dtype not in FLOATS or any(weight.dtype != dtype for weight in weights):
        raise ValueError("weights must all be float32, or all bfloat16, or all float16")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"weights must be [N, {width}], not of shape {tuple(weight.shape)}")
        _layout("weights", weight, column_major)
        vector("bias", bias, len(weight))
    return sum(len(weight) for weight in weights)


def low_bit(weights: LowBitWeights, biases: Sequence[torch.Tensor | None], width: int) -> int:
    """Outputs of all matrices of `width` columns together, in codes of one format with their scales."""
    codes, scales, outputs, group, form = weights
    of = column_format(form, group)
    if not codes or len({len(codes), len(scales), len(outputs), len(biases)}) > 1:
        raise ValueError(
            f"{len(codes)} codes with {len(scales)} scales, {len(outputs)} outputs and {len(biases)} biases"
        )
    for each, scale, size, bias in zip(codes, scales, outputs, biases, strict=True):
        if each.dtype is not of.codes_dtype:
            raise ValueError(f"codes of {form} must be {_name(of.codes_dtype)}, not {each.dtype}")
        _in_columns("codes", each, width, of.codes_width(size))
        if scale.dtype is not SCALE_DTYPE:
            raise ValueError(f"scales must be {_name(SCALE_DTYPE)}, not {scale.dtype}")
        _in_columns("scales", scale, width, -(-size // group))
        vector("bias", bias, size)
    return sum(outputs)


def column_format(form: str, group: int) -> type[ColumnFormat]:
    """The format of that name, for so many outputs that share a scale."""
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}, not {group}")
    if form not in FORMATS:
        raise ValueError(f"form must be one of {', '.join(FORMATS)}, not {form}")
    return FORMATS[form]


def _in_columns(name: str, x: torch.Tensor, width: int, size: int) -> None:
    if x.shape != (width, size) or (size > 1 and x.stride(1) != 1) or (width > 1 and x.stride(0) < size):
        raise ValueError(f"{name} must be [{width}, {size}], each column in one piece, not of shape {tuple(x.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(name: str, weight: torch.Tensor, column_major: bool) -> None:
    along = 0 if column_major else 1
    if weight.shape[along] > 1 and weight.stride(along) != 1:
        mend = "larosa.ops.column_major(weight)" if column_major else "weight.contiguous()"
        raise ValueError(f"{name} must be {'column' if column_major else 'row'}-major: {mend}")


def residual(
    x: torch.Tensor | None,
    adapter: torch.Tensor | None,
    rows: int,
    outputs: int,
    dtype: torch.dtype | None = None,
    scale: torch.Tensor | None = None,
) -> int:
    """What is added to a product, and the matrix [outputs, width] in `dtype`, or any, that it goes through first.

    With a scale that is int8, and can have up to `width` columns more.

    Returns the width.
    """
    width = outputs if adapter is None else adapter.shape[-1]
    if scale is not None:
        vector("adapter_scale", scale, outputs)
        width = 0 if x is None else vectors("residual", x)[1]
        if adapter is None or not width <= adapter.shape[-1] <= 2 * width:
            raise ValueError(f"with adapter_scale, adapter must be [{outputs}, D to 2 D] for a residual [{rows}, D]")
    if x is not None and (x.dtype != torch.float32 or x.shape != (rows, width) or not x.is_contiguous()):
        raise ValueError(f"residual must be contiguous float32 of shape {(rows, width)}")
    if adapter is None:
        return width
    if x is None or adapter.dim() != 2 or len(adapter) != outputs:
        raise ValueError(f"adapter must be [{outputs}, D] for a residual [{rows}, D]")
    wanted = dtype if scale is None else torch.int8
    if adapter.dtype != wanted and (wanted is not None or adapter.dtype not in FLOATS):
        of = "a float dtype" if dtype is None else f"{dtype} like the weights"
        raise ValueError(f"adapter must be {of}, or int8 with a scale, not {adapter.dtype}")
    _layout("adapter", adapter, column_major=True)
    return width


def board(x: torch.Tensor | None) -> None:
    """Checks what blocks tell each other by, if anything."""
    if x is not None and (x.dtype != torch.int64 or x.numel() != 1):
        raise ValueError("board must be one int64, zero")


def gate_and_up(sizes: Sequence[int]) -> None:
    """Checks the outputs of the matrices of an MLP's gated activation."""
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise ValueError(f"gate and up must be two matrices of one size, not of {list(sizes)} outputs")


def site(
    k: int | None,
    threshold: float | None,
    eps: float | None,
    swiglu: bool,
    outputs: Sequence[int],
    residual: torch.Tensor | None,
    adapter: torch.Tensor | None,
) -> None:
    """What of a site goes together."""
    if k is not None and threshold is not None:
        raise ValueError("entries are kept by k or by a threshold, not by both")
    if swiglu:
        gate_and_up(outputs)
        if residual is not None:
            raise ValueError("nothing is added to silu(gate) * up")
    if adapter is not None and eps is not None:
        raise ValueError("an adapter goes with x as it is, not with its norm")


def site_columns(
    x: torch.Tensor, columns: int, k: int | None, threshold: float | None, score: torch.Tensor | None
) -> int:
    """How many of so many columns each entry of a site's vector has: several where a threshold selects, or nothing."""
    each = columns_each("x", x, columns)
    if each > 1 and k is not None:
        raise ValueError(f"entries that k keeps have one column each: codes must be of {x.shape[1]}, not {columns}")
    if threshold is not None:
        if each > 1 and score is None:
            raise ValueError(f"score must have {columns} entries, one a column, where an entry has {each} of them")
        vector("score", score, columns)
    return each


def attention(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    tables: Sequence[torch.Tensor | None],
    scales: torch.Tensor | None,
    cache: torch.Tensor | None,
) -> int:
    """The number of query heads of what `attend` is given; `tables` are cos and sin."""
    rows, width = vectors("qkv", qkv)
    if keys.dim() != (3 if cache is None else 4):
        raise ValueError(f"keys must be [K, T, d], and [C, K, T, d] with cache, not of shape {tuple(keys.shape)}")
    key_heads, length, size = keys.shape[-3:]
    heads = width // size - 2 * key_heads
    if width % size or size % 2 or heads < key_heads or heads % key_heads:
        raise ValueError(f"qkv of shape {tuple(qkv.shape)} does not hold the heads of a cache {tuple(keys.shape)}")
    kinds = FLOATS if scales is None else (torch.int8,)
    if keys.dtype not in kinds or values.dtype != keys.dtype or values.shape != keys.shape:
        raise ValueError(
            "keys and values must be alike in shape and dtype, and float32, bfloat16 or float16, or int8 with scales"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
    if scales is not None and (
        scales.dtype != torch.bfloat16 or scales.shape != (*keys.shape[:-1], 2) or not scales.is_contiguous()
    ):
        raise ValueError(f"scales must be contiguous bfloat16 of shape {(*keys.shape[:-1], 2)}")
    for name, numbers in (("position", position), ("cache", cache)):
        if numbers is not None and (
            numbers.dtype != torch.int64 or numbers.shape != (rows,) or not numbers.is_contiguous()
        ):
            raise ValueError(f"{name} must be contiguous int64 [{rows}], one a row")
    if len({table is None for table in tables}) > 1:
        raise ValueError("cos and sin come together")
    for table in tables:
        if table is not None and (
            table.dtype != torch.float32 or table.shape != (length, size) or not table.is_contiguous()
        ):
            raise ValueError(f"cos and sin must be contiguous float32 of shape {(length, size)}")
    return heads
