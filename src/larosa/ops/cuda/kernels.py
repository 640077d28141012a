"""The operators on CUDA by the kernels in `source/`: each one launch, or several where one would not be faster.

Some read early, before the launches in front of them have finished, what is not to be written there: each says what.
That holds under `launch.early_launches` alone; otherwise a kernel begins when all before it have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_float, c_int, c_longlong
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from larosa.errors import LarosaError
from larosa.ops import checks
from larosa.ops.cuda.launch import Argument, Grid, early_launches, launch, machine
from larosa.ops.cuda.parameters import TYPE_NAMES, Matrices, Rotary, Vector, address, flag
from larosa.ops.cuda.plan import (
    ATTEND_THREADS,
    SPARSE_THREADS,
    above_plan,
    alone_plan,
    attend_plan,
    cut_plan,
    fused_plan,
    linear_plan,
    low_bit_plan,
    sparse_plan,
    swiglu_plan,
    together,
)
from larosa.ops.cuda.product import Product, adapter_arguments, aligned, codes_width
from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import LowBitWeights
from larosa.ops.select import CountedSelection, Selection

_ROW = 1024  # threads of a block of select.cu, elementwise.cu and greedy.cu
_GREEDY_BLOCKS = 8
_MOST_ATTENDING = 8  # rows, of which each block may make the keys and values of all
_WIDEST = 32 * _ROW
_WIDEST_FUSED = 8192  # of what top_k_linear.cu selects from: beyond it each block would take too long
_WIDEST_COMPARED = 16384  # the same in above_linear.cu, but of a norm; more than 32 entries a thread do not fit
#: Of a vector so wide one block of top_k_linear_cut.cu selects for all. With 11,264 entries that takes an H200 .3 us
#: more than two kernels do, with 14,208 1.0 us less; more than 32 a thread do not fit.
_CUT = (12288, 16384)
#: Of an MLP's vector so wide, whose product takes an adapter along: of longer ones the selection takes longer than
#: reading the adapter does, which then is in the way of the selection's loads.
_EARLY = (8192, 16384)
_BELOW_ALL = -1.0  # a threshold that all entries are above
_KEPT_STEP = 1024  # one compiled kernel for this many k


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See `rms_norm_reference`."""
    rows, width = checks.vectors("x", x)
    result = torch.empty_like(x)
    arguments = (address(x), c_int(width), Vector.of("gain", gain, width), c_float(eps), address(result))
    _launch(x, "elementwise.cu", "rms_norm", {}, Grid(rows, 1, _ROW), arguments)
    return result


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `silu_mul_reference`."""
    rows, width = len(gate_up), checks.halves("gate_up", gate_up)
    result = gate_up.new_empty(rows, width)
    arguments = (address(gate_up), c_int(width), address(result))
    _launch(gate_up, "elementwise.cu", "silu_mul", {}, Grid(-(-width // _ROW), rows, _ROW), arguments)
    return result


def embed(embedding: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `embed_reference`. A token that the embedding does not have gives NaN."""
    vocabulary, width = embedding.shape
    if embedding.dtype not in TYPE_NAMES or not embedding.is_contiguous():
        raise ValueError("embedding must be contiguous, and float32, bfloat16 or float16")
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or not tokens.is_contiguous():
        raise ValueError("tokens must be contiguous int64 of one dimension")
    result = embedding.new_empty(len(tokens), width, dtype=torch.float32)
    table = Vector.of("embedding", embedding.view(-1), embedding.numel())
    arguments = (table, c_longlong(vocabulary), c_int(width), address(tokens), address(result))
    _launch(embedding, "elementwise.cu", "embed", {}, Grid(-(-width // _ROW), len(tokens), _ROW), arguments)
    return result


def top_k(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """See `top_k_reference`."""
    _, width = checks.vectors("x", x)
    return _select("AS_IS", x, width, k, score)


def rms_norm_top_k(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None = None
) -> Selection:
    """See `rms_norm_top_k_reference`."""
    _, width = checks.vectors("x", x)
    return _select("NORMED", x, width, k, score, gain, eps)


def silu_mul_top_k(gate_up: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """See `silu_mul_top_k_reference`."""
    return _select("GATED", gate_up, checks.halves("gate_up", gate_up), k, score)


def above(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    """See `above_reference`."""
    _, width = checks.vectors("x", x)
    return _compare("AS_IS", x, width, threshold, score)


def rms_norm_above(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None = None
) -> CountedSelection:
    """See `rms_norm_above_reference`."""
    _, width = checks.vectors("x", x)
    return _compare("NORMED", x, width, threshold, score, gain, eps)


def silu_mul_above(gate_up: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    """See `silu_mul_above_reference`."""
    return _compare("GATED", gate_up, checks.halves("gate_up", gate_up), threshold, score)


def linear(x: torch.Tensor, weights: Weights, biases: Biases, residual: torch.Tensor | None = None) -> torch.Tensor:
    """See `linear_reference`; the weights are row-major."""
    rows, width = checks.vectors("x", x)
    outputs = checks.matrices(weights, biases, width, column_major=False)
    checks.residual(residual, None, rows, outputs)
    result = x.new_empty(rows, outputs)
    element, gpu = weights[0].element_size(), machine(x.device)
    macros = {"WEIGHT": TYPE_NAMES[weights[0].dtype], "ALIGNED": aligned(weights, [width], along=0)}
    for part in _parts(rows, together(16 // element)):
        plan = linear_plan(gpu, len(part))
        matrices, tiles = Matrices.of(weights, biases, plan.tile, along=0)
        added = None if residual is None else residual[part.start :]
        arguments = (address(x[part.start :]), c_int(width), matrices, address(added), address(result[part.start :]))
        sizes = {"ROWS": str(len(part)), "CHUNK": str(plan.chunk)}
        grid = Grid(plan.blocks(gpu, tiles), 1, plan.threads)
        _launch(x, "linear.cu", "linear", {**macros, **sizes}, grid, (*arguments, c_int(outputs), c_int(tiles)))
    return result


def _parts(rows: int, most: int) -> list[range]:
    """Rows that read the same weights, as many at a time as can."""
    return [range(rows)[first : first + most] for first in range(0, rows, most)]


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
    """See `sparse_linear_reference`; the matrices are column-major.

    With an adapter, the residual is read early: neither of the two kernels launched just before may write it.
    """
    width = weights[0].shape[1] if weights else 0
    rows, k = checks.listed(values, indices, width)
    checks.counts(count, rows)
    outputs = checks.matrices(weights, biases, width, column_major=True)
    carried = checks.residual(residual, adapter, rows, outputs, weights[0].dtype, adapter_scale)
    sizes, gpu, element = [len(weight) for weight in weights], machine(values.device), weights[0].element_size()
    listed = k if count is None else k // 2  # what the host can only guess
    alone = None if adapter is None else alone_plan(gpu, sizes, listed, element)
    plan = alone or sparse_plan(gpu, sizes, listed, element)
    product = Product.of(plan, weights, biases, rows, [] if adapter is None else [adapter])
    along = _Along(residual, adapter, adapter_scale, carried)
    return _multiply(values, indices, count, product, outputs, along, alone is not None, 16 // element)


class _Along(NamedTuple):
    """What is added to a product: a residual, or that of so many entries through its adapter."""

    residual: torch.Tensor | None
    adapter: torch.Tensor | None
    scale: torch.Tensor | None
    carried: int

    def arguments(self, row: int) -> tuple[list[Argument], dict[str, str]]:
        """As of `adapter_arguments`, from a row on."""
        residual = None if self.residual is None else self.residual[row:]
        return adapter_arguments(residual, self.adapter, self.scale, self.carried)


def _multiply(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    count: torch.Tensor | None,
    product: Product,
    outputs: int,
    along: _Along,
    alone: bool,
    width: int,
) -> torch.Tensor:
    """The product, of which a thread has `width` weights in 16 bytes: of several rows at once where all are whole."""
    rows, k = values.shape
    result = values.new_empty(rows, outputs)
    macros = {**product.macros, "ADAPTER": flag(along.adapter is not None), "ALONE": flag(alone)}
    whole = indices is None and count is None
    for part in _parts(rows, together(width)) if whole else [range(rows)]:
        added, format_ = along.arguments(part.start)
        operands = address(values[part.start :]), address(indices), c_int(k), address(count), product.matrices
        arguments = (*operands, *added, address(result[part.start :]), c_int(outputs))
        grid = replace(product.grid, y=1) if whole else product.grid
        at_once = {"ROWS": str(len(part) if whole else 1)}
        _launch(values, "sparse_linear.cu", "sparse_linear", {**macros, **format_, **at_once}, grid, arguments)
    return result


def low_bit_linear(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    codes: Weights,
    scales: Weights,
    outputs: list[int],
    group: int,
    biases: Biases,
    residual: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `low_bit_linear_reference`.

    With an adapter, the residual is read early: neither of the two kernels launched just before may write it.
    """
    weights, depth = LowBitWeights(codes, scales, outputs, group), len(codes[0]) if codes else 0
    rows, k = checks.listed(values, indices, depth)
    checks.counts(count, rows)
    total = checks.low_bit(weights, biases, depth)
    carried = checks.residual(residual, adapter, rows, total, None, adapter_scale)
    listed, width = k if count is None else k // 2, codes_width(codes[0])  # what the host can only guess
    plan = low_bit_plan(machine(values.device), outputs, listed, width)
    assert plan is not None, "only those that select have none"
    product = Product.of_codes(plan, weights, biases, rows, adapter)
    teams = adapter is not None and SPARSE_THREADS // 2 % plan.lanes == 0
    along = _Along(residual, adapter, adapter_scale, carried)
    return _multiply(values, indices, count, product, total, along, teams, width)


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
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `low_bit_site_reference`. One launch where every block can select for itself, else one after the other.

    With an adapter, the residual is read early: neither of the two kernels launched just before may write it.
    """
    checks.site(k, threshold, eps, swiglu, outputs, residual, adapter)
    weights, source = LowBitWeights(codes, scales, outputs, group), "AS_IS" if eps is None else "NORMED"
    rows, width = checks.vectors("x", x)
    total, element = checks.low_bit(weights, biases, width), codes_width(codes[0])
    carried = checks.residual(residual, adapter, rows, total, None, adapter_scale)
    selects, everything = k is not None, k is None and threshold is None
    widest = _WIDEST_COMPARED if source == "AS_IS" and not selects else _WIDEST_FUSED
    plan = None
    # All of x as it is has nothing to select, and what selects by count takes no adapter along.
    apart = (everything and eps is None) or (selects and adapter is not None)
    if k != 0 and width <= widest and not apart:
        listed = width if everything else k or width // 2
        plan = low_bit_plan(machine(x.device), outputs, listed, element, k or width)
    if plan is None:
        along = residual, adapter, adapter_scale
        return _low_bit_apart(x, gain, eps, score, k, threshold, swiglu, weights, biases, *along)
    product = Product.of_codes(plan, weights, biases, rows, adapter, swiglu)
    result = x.new_empty(rows, total // (1 + swiglu))
    vectors = Vector.of("gain", gain, width), c_float(eps or 0.0), Vector.of("score", score, width)
    macros = {**product.macros, **_selection_macros(source, width, SPARSE_THREADS, gain, score)}
    if k is not None:
        checks.kept(k, width)
        macros["MOST_KEPT"] = str(-(-k // _KEPT_STEP) * _KEPT_STEP)
        last = address(residual), address(result), c_int(result.shape[1])
        counted = address(x), c_int(width), c_int(k), *vectors, product.matrices, *last
        _launch(x, "top_k_linear.cu", "top_k_linear", macros, product.grid, counted)
        return result
    carrying, format_ = adapter_arguments(residual, adapter, adapter_scale, carried)
    macros |= {"ADAPTER": flag(adapter is not None), "ALONE": flag(True), **format_}
    least = c_float(_BELOW_ALL if threshold is None else threshold)
    written = address(result), c_int(result.shape[1])
    compared = address(x), c_int(width), least, *vectors, product.matrices, *carrying, *written
    _launch(x, "above_linear.cu", "above_linear", macros, product.grid, compared)
    return result


def _low_bit_apart(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float | None,
    score: torch.Tensor | None,
    k: int | None,
    threshold: float | None,
    swiglu: bool,
    weights: LowBitWeights,
    biases: Biases,
    residual: torch.Tensor | None,
    *along: torch.Tensor | None,
) -> torch.Tensor:
    width, source = x.shape[1], "AS_IS" if eps is None else "NORMED"
    indices, count = None, None
    if k is not None:
        x, indices = _select(source, x, width, k, score, gain, eps or 0.0)
    elif threshold is not None:
        x, indices, count = _compare(source, x, width, threshold, score, gain, eps or 0.0)
    elif eps is not None:
        x = rms_norm(x, gain, eps)
    result = low_bit_linear(x, indices, *weights, biases, residual, count, *along)
    return silu_mul(result) if swiglu else result


def top_k_linear(
    x: torch.Tensor,
    k: int,
    score: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
    board: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `top_k_linear_reference`.

    With an adapter, the residual is read early: the kernel launched just before may not write it.
    """
    checks.board(board)
    if adapter is None:
        return _select_and_multiply("AS_IS", x, k, score, None, 0.0, False, weights, biases, residual)
    rows, width = checks.vectors("x", x)
    checks.kept(k, width)
    outputs = checks.matrices(weights, biases, width, column_major=True)
    plan = None
    if board is not None and k and _CUT[0] < width <= _CUT[1]:
        sizes = [len(weight) for weight in weights]
        plan = cut_plan(machine(x.device), sizes, width, k, weights[0].element_size())
    if plan is None:
        chosen = _select("AS_IS", x, width, k, score)
        return sparse_linear(*chosen, weights, biases, residual, adapter, adapter_scale)
    carried = checks.residual(residual, adapter, rows, outputs, weights[0].dtype, adapter_scale)
    along = _Along(residual, adapter, adapter_scale, carried)
    product = Product.of(plan, weights, biases, 1, [adapter])
    result = x.new_empty(rows, outputs)
    macros = {**product.macros, "ALONE": flag(True), **_selection_macros("AS_IS", width, SPARSE_THREADS, None, score)}
    grid = replace(product.grid, x=product.grid.x + plan.cluster)
    for row in range(rows):
        added, format_ = along.arguments(row)
        operands = address(x[row:]), c_int(width), c_int(k), Vector.of("score", score, width), product.matrices
        arguments = (*operands, *added, address(board), address(result[row:]))
        with early_launches(False) if row else nullcontext():  # blocks of one row at a time have the board
            _launch(x, "top_k_linear_cut.cu", "top_k_linear_cut", {**macros, **format_}, grid, arguments)
    return result


def rms_norm_top_k_linear(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """See `rms_norm_top_k_linear_reference`."""
    return _select_and_multiply("NORMED", x, k, score, gain, eps, False, *product)


def rms_norm_top_k_swiglu(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """See `rms_norm_top_k_swiglu_reference`."""
    return _select_and_multiply("NORMED", x, k, score, gain, eps, True, *product)


def _select_and_multiply(
    source: str,
    x: torch.Tensor,
    k: int,
    score: torch.Tensor | None,
    gain: torch.Tensor | None,
    eps: float,
    swiglu: bool,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One launch where every block can have a multiprocessor to itself, else one after the other."""
    rows, width = checks.vectors("x", x)
    checks.kept(k, width)
    outputs = checks.matrices(weights, biases, width, column_major=True)
    sizes = [len(weight) for weight in weights]
    if swiglu:
        checks.gate_and_up(sizes)
        plan = swiglu_plan(machine(x.device), outputs, k, weights[0].element_size())
    else:
        plan = fused_plan(machine(x.device), sizes, k, weights[0].element_size())
    if plan is None or not k or width > _WIDEST_FUSED:
        linear = sparse_linear(*_select(source, x, width, k, score, gain, eps), weights, biases, residual)
        return silu_mul(linear) if swiglu else linear
    checks.residual(residual, None, rows, outputs)
    product = Product.of(plan, weights, biases, rows, swiglu=swiglu)
    outputs //= 1 + swiglu
    result = x.new_empty(rows, outputs)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, width)
    arguments = (address(x), c_int(width), c_int(k), *vectors, product.matrices)
    macros = {
        **product.macros,
        **_selection_macros(source, width, SPARSE_THREADS, gain, score),
        "MOST_KEPT": str(-(-k // _KEPT_STEP) * _KEPT_STEP),
    }
    last = (address(residual), address(result), c_int(outputs))
    _launch(x, "top_k_linear.cu", "top_k_linear", macros, product.grid, (*arguments, *last))
    return result


def above_linear(
    x: torch.Tensor, threshold: float, score: torch.Tensor | None, weights: Weights, biases: Biases, *along: Any
) -> torch.Tensor:
    """See `above_linear_reference`.

    With an adapter, the residual is read early: neither of the two kernels launched just before may write it.
    """
    return _compare_and_multiply("AS_IS", x, threshold, score, None, 0.0, False, weights, biases, *along)


def rms_norm_above_linear(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """See `rms_norm_above_linear_reference`."""
    return _compare_and_multiply("NORMED", x, threshold, score, gain, eps, False, *product)


def rms_norm_above_swiglu(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None, *product: Any
) -> torch.Tensor:
    """See `rms_norm_above_swiglu_reference`."""
    return _compare_and_multiply("NORMED", x, threshold, score, gain, eps, True, *product)


def _compare_and_multiply(
    source: str,
    x: torch.Tensor,
    threshold: float,
    score: torch.Tensor | None,
    gain: torch.Tensor | None,
    eps: float,
    swiglu: bool,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """One launch where every block can have a multiprocessor to itself, else one after the other."""
    rows, width = checks.vectors("x", x)
    outputs = checks.matrices(weights, biases, width, column_major=True)
    carried = checks.residual(residual, adapter, rows, outputs, weights[0].dtype, adapter_scale)
    sizes, element = [len(weight) for weight in weights], weights[0].element_size()
    if swiglu:
        checks.gate_and_up(sizes)
    plan = above_plan(machine(x.device), sizes, width, element, swiglu=swiglu, carries=adapter is not None)
    if plan is None or width > (_WIDEST_COMPARED if source == "AS_IS" else _WIDEST_FUSED):
        values, indices, count = _compare(source, x, width, threshold, score, gain, eps)
        linear = sparse_linear(values, indices, weights, biases, residual, adapter, adapter_scale, count)
        return silu_mul(linear) if swiglu else linear
    product = Product.of(plan, weights, biases, rows, [] if adapter is None else [adapter], swiglu)
    outputs //= 1 + swiglu
    result = x.new_empty(rows, outputs)
    macros = {
        **product.macros,
        **_selection_macros(source, width, SPARSE_THREADS, gain, score),
        **{"ADAPTER": flag(adapter is not None), "ALONE": flag(True)},
    }
    along, format_ = adapter_arguments(residual, adapter, adapter_scale, carried)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, width)
    last = address(result), c_int(outputs)
    arguments = (address(x), c_int(width), c_float(threshold), *vectors, product.matrices, *along, *last)
    _launch(x, "above_linear.cu", "above_linear", {**macros, **format_}, product.grid, arguments)
    return result


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
    plan = attend_plan(machine(qkv.device), query_heads, key_heads, length)
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
    grid = Grid(query_heads // plan.heads * plan.cluster, rows, ATTEND_THREADS, plan.cluster)
    _launch(qkv, "attend.cu", "attend", macros, grid, (*addresses, caches, rotary, *sizes, address(result)))
    return result


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See `greedy_reference`."""
    rows, vocabulary = checks.vectors("logits", logits)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    cluster = _GREEDY_BLOCKS if machine(logits.device).overlaps else 1
    arguments = (address(logits), c_int(vocabulary), address(tokens))
    _launch(logits, "greedy.cu", "greedy", {"CLUSTER": str(cluster)}, Grid(cluster, rows, _ROW, cluster), arguments)
    return tokens


def _select(
    source: str,
    x: torch.Tensor,
    width: int,
    k: int,
    score: torch.Tensor | None,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> Selection:
    checks.kept(k, width)
    macros = _selecting_macros(source, width, gain, score)
    values, indices = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int32)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, width)
    arguments = (address(x), c_int(width), c_int(k), *vectors, address(values), address(indices))
    if k:
        _launch(x, "select.cu", "select_top_k", macros, Grid(len(x), 1, _ROW), arguments)
    return values, indices


def _compare(
    source: str,
    x: torch.Tensor,
    width: int,
    threshold: float,
    score: torch.Tensor | None,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> CountedSelection:
    macros, rows = _selecting_macros(source, width, gain, score), len(x)
    values, indices = x.new_empty(rows, width), x.new_empty(rows, width, dtype=torch.int32)
    count = x.new_empty(rows, dtype=torch.int64)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, width)
    results = address(values), address(indices), address(count)
    arguments = (address(x), c_int(width), c_float(threshold), *vectors, *results)
    _launch(x, "above.cu", "select_above", macros, Grid(rows, 1, _ROW), arguments)
    return values, indices, count


def _selecting_macros(source: str, width: int, gain: torch.Tensor | None, score: torch.Tensor | None) -> dict[str, str]:
    """What a kernel is told that selects by one block of its own."""
    if width > _WIDEST:
        raise LarosaError(
            f"the CUDA kernels select from at most {_WIDEST} entries, not {width}: set LAROSA_CUDA_KERNELS=triton"
        )
    early = source == "AS_IS" and _EARLY[0] < width <= _EARLY[1]
    return {"BLOCK": str(_ROW), "EARLY": flag(early), **_selection_macros(source, width, _ROW, gain, score)}


def _selection_macros(
    source: str, width: int, threads: int, gain: torch.Tensor | None, score: torch.Tensor | None
) -> dict[str, str]:
    formats = {
        name: "None" if vector is None else TYPE_NAMES[vector.dtype]
        for name, vector in (("GAIN", gain), ("SCORE", score))
    }
    return {"SOURCE": source, "EACH": str(-(-width // threads)), "FILLED": flag(width % threads == 0), **formats}


def _launch(
    x: torch.Tensor, source: str, kernel: str, macros: dict[str, str], grid: Grid, arguments: Sequence[Argument]
) -> None:
    if grid.x and grid.y:
        launch(x.device, source, kernel, macros, grid, arguments)
