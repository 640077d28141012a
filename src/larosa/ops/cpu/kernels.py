"""The operators of a decoding step on the CPU, each one call into the library."""

from __future__ import annotations

from ctypes import byref

import torch

from larosa.ops import checks
from larosa.ops.cpu import arguments
from larosa.ops.cpu.library import Attention, Vector, load
from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import LowBitWeights
from larosa.ops.schema import implement
from larosa.ops.select import CountedSelection, Selection

# `larosa_status`.
_BAD_INDEX = 1
_BAD_POSITION = 2
_BAD_CACHE = 4


@implement("rms_norm", "CPU")
def _rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    x = arguments.activations("x", x)
    rows, width = x.shape
    out = torch.empty_like(x)
    load().rms_norm(x.data_ptr(), arguments.vector("gain", gain, width), eps, rows, width, out.data_ptr())
    return out


@implement("silu_mul", "CPU")
def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up, width = _gate_up(gate_up)
    out = gate_up.new_empty(len(gate_up), width)
    load().silu_mul(gate_up.data_ptr(), len(gate_up), width, out.data_ptr())
    return out


@implement("top_k", "CPU")
def _top_k(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    x = arguments.activations("x", x)
    rows, width = x.shape
    values, indices = arguments.room(x, k, width)
    packed = arguments.vector("score", score, width)
    load().top_k(x.data_ptr(), rows, width, k, packed, values.data_ptr(), indices.data_ptr())
    return values, indices


@implement("rms_norm_top_k", "CPU")
def _rms_norm_top_k(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None = None
) -> Selection:
    x = arguments.activations("x", x)
    rows, width = x.shape
    values, indices = arguments.room(x, k, width)
    gains, scores = arguments.vector("gain", gain, width), arguments.vector("score", score, width)
    load().rms_norm_top_k(x.data_ptr(), gains, eps, rows, width, k, scores, values.data_ptr(), indices.data_ptr())
    return values, indices


@implement("silu_mul_top_k", "CPU")
def _silu_mul_top_k(gate_up: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    gate_up, width = _gate_up(gate_up)
    rows = len(gate_up)
    values, indices = arguments.room(gate_up, k, width)
    packed = arguments.vector("score", score, width)
    load().silu_mul_top_k(gate_up.data_ptr(), rows, width, k, packed, values.data_ptr(), indices.data_ptr())
    return values, indices


@implement("above", "CPU")
def _above(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    x = arguments.activations("x", x)
    rows, width = x.shape
    packed, columns = arguments.scores(score, width)
    found = values, indices, count = _counted(x, columns)
    outputs = values.data_ptr(), indices.data_ptr(), count.data_ptr()
    load().above(x.data_ptr(), rows, width, columns, threshold, packed, *outputs)
    return found


@implement("rms_norm_above", "CPU")
def _rms_norm_above(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None = None
) -> CountedSelection:
    x = arguments.activations("x", x)
    rows, width = x.shape
    gains, (scores, columns) = arguments.vector("gain", gain, width), arguments.scores(score, width)
    found = values, indices, count = _counted(x, columns)
    outputs = values.data_ptr(), indices.data_ptr(), count.data_ptr()
    load().rms_norm_above(x.data_ptr(), gains, eps, rows, width, columns, threshold, scores, *outputs)
    return found


@implement("silu_mul_above", "CPU")
def _silu_mul_above(gate_up: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    gate_up, width = _gate_up(gate_up)
    packed, columns = arguments.scores(score, width)
    found = values, indices, count = _counted(gate_up, columns)
    outputs = values.data_ptr(), indices.data_ptr(), count.data_ptr()
    load().silu_mul_above(gate_up.data_ptr(), len(gate_up), width, columns, threshold, packed, *outputs)
    return found


def _counted(x: torch.Tensor, columns: int) -> CountedSelection:
    """Room for a selection from rows of so many columns, and for how many each has."""
    return *arguments.room(x, columns, columns), x.new_empty(len(x), dtype=torch.int64)


@implement("linear", "CPU")
def _linear(x: torch.Tensor, weights: Weights, biases: Biases, residual: torch.Tensor | None = None) -> torch.Tensor:
    x = arguments.activations("x", x)
    rows, depth = x.shape
    matrices, outputs = arguments.matrices(weights, biases, depth, column_major=False)
    out = x.new_empty(rows, outputs)
    added = arguments.residual(residual, out)
    status = load().linear(
        x.data_ptr(),
        rows,
        depth,
        matrices,
        len(weights),
        None if added is None else added.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check_status(status)
    return out


@implement("adapt", "CPU")
def _adapt(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = arguments.activations("x", x)
    rows, width = x.shape
    matrix = arguments.adapter(weight, scale, width)
    out = x.new_empty(rows, len(weight))
    depth, threads = weight.shape[1], torch.get_num_threads()
    check_status(load().adapt(x.data_ptr(), rows, width, depth, matrix, out.data_ptr(), threads))
    return out


def _no_adapter(adapter: torch.Tensor | None) -> None:
    if adapter is not None:
        raise ValueError(
            "on the CPU a residual goes through its adapter by rows, before: torch.ops.larosa.linear or adapt"
        )


@implement("sparse_linear", "CPU")
def _sparse_linear(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    _no_adapter(adapter)
    if indices is None:
        raise ValueError("on the CPU all columns are listed too: indices must be [B, k] int32")
    values = arguments.activations("values", values)
    indices = arguments.selection(indices, values)
    checks.counts(count, len(values))
    rows, k = values.shape
    depth = weights[0].shape[1] if weights else 0
    matrices, outputs = arguments.matrices(weights, biases, depth, column_major=True)
    out = values.new_empty(rows, outputs)
    added = arguments.residual(residual, out)
    status = load().sparse_linear(
        values.data_ptr(),
        indices.data_ptr(),
        rows,
        k,
        depth,
        matrices,
        len(weights),
        None if added is None else added.data_ptr(),
        out.data_ptr(),
        None if count is None else count.data_ptr(),
        torch.get_num_threads(),
    )
    check_status(status)
    return out


@implement("low_bit_linear", "CPU")
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
    _no_adapter(adapter)
    values = arguments.activations("values", values)
    rows, k = values.shape
    depth = len(codes[0]) if codes else 0
    if indices is not None:
        indices = arguments.selection(indices, values)
        checks.counts(count, rows)
    elif count is not None:
        raise ValueError("a count is of the entries of a list: give indices")
    elif k != depth and (not k or depth % k):
        raise ValueError(
            f"without indices values must be [B, {depth}], or [B, D] with {depth} a multiple of D, "
            f"not {list(values.shape)}"
        )
    matrices, total = arguments.low_bit(LowBitWeights(codes, scales, outputs, group, form), biases, depth)
    out = values.new_empty(rows, total)
    added = arguments.residual(residual, out)
    status = load().low_bit_linear(
        values.data_ptr(),
        None if indices is None else indices.data_ptr(),
        rows,
        k,
        depth,
        matrices,
        len(codes),
        None if added is None else added.data_ptr(),
        out.data_ptr(),
        None if count is None else count.data_ptr(),
        torch.get_num_threads(),
    )
    check_status(status)
    return out


@implement("attend", "CPU")
def _attend(
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
    qkv = arguments.activations("qkv", qkv)
    dtype = arguments.cache(keys, values, scales, cache)
    key_heads, capacity, size = keys.shape[-3:]
    heads, rows = arguments.query_heads(qkv, keys), len(qkv)
    arguments.for_rows("position", position, rows)
    arguments.for_rows("cache", cache, rows)
    if (cos is None) != (sin is None):
        raise ValueError("give both cos and sin, or neither")
    cos, sin = arguments.rotary("cos", cos, keys), arguments.rotary("sin", sin, keys)
    out = qkv.new_empty(rows, heads * size)
    attention = Attention(
        qkv.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        None if scales is None else scales.data_ptr(),
        position.data_ptr(),
        None if cache is None else cache.data_ptr(),
        None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(),
        Vector.from_buffer_copy(arguments.vector("q_gain", q_gain, size)),
        Vector.from_buffer_copy(arguments.vector("k_gain", k_gain, size)),
        heads,
        key_heads,
        capacity,
        size,
        dtype,
        window,
        rows,
        1 if cache is None else len(keys),
        eps,
        scale,
    )
    check_status(load().attend(byref(attention), out.data_ptr(), torch.get_num_threads()))
    return out


def _gate_up(gate_up: torch.Tensor) -> tuple[torch.Tensor, int]:
    gate_up = arguments.activations("gate_up", gate_up)
    width, odd = divmod(gate_up.shape[1], 2)
    if odd:
        raise ValueError(f"gate_up {list(gate_up.shape)} is not two vectors side by side")
    return gate_up, width


def check_status(status: int) -> None:
    """Raise what a status of the library means; 0 is none."""
    if status == _BAD_INDEX:
        raise IndexError("an index is not that of a column of the weights")
    if status == _BAD_POSITION:
        raise IndexError("position is not that of a place in the cache, or the same for two rows of one cache")
    if status == _BAD_CACHE:
        raise IndexError("cache is not the number of one of the caches")
    if status:
        raise ValueError("a tensor begins in the middle of an element: clone it")
