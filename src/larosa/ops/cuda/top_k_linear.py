"""A selection and the product with what it keeps, in one kernel where every block can select for itself."""

from __future__ import annotations

from contextlib import nullcontext
from ctypes import c_float, c_int
from dataclasses import replace
from typing import Any

import torch

from larosa.ops import checks
from larosa.ops.cuda import launch
from larosa.ops.cuda.elementwise import silu_mul
from larosa.ops.cuda.linear import Along, sparse_linear
from larosa.ops.cuda.parameters import Vector, address, flag
from larosa.ops.cuda.plan import SPARSE_THREADS, above_plan, cut_plan, fused_plan, swiglu_plan
from larosa.ops.cuda.product import Product, adapter_arguments
from larosa.ops.cuda.select import compare, select, selection_macros
from larosa.ops.linear import Biases, Weights

WIDEST_FUSED = 8192  # of what top_k_linear.cu selects from: beyond it each block would take too long
WIDEST_COMPARED = 16384  # the same in above_linear.cu, but of a norm; more than 32 entries a thread do not fit
KEPT_STEP = 1024  # one compiled kernel for this many k
#: Of a vector so wide one block of top_k_linear_cut.cu selects for all. With 11,264 entries that takes an H200 .3 us
#: more than two kernels do, with 14,208 1.0 us less; more than 32 a thread do not fit.
_CUT = (12288, 16384)


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
        plan = cut_plan(launch.machine(x.device), sizes, width, k, weights[0].element_size())
    if plan is None:
        chosen = select("AS_IS", x, width, k, score)
        return sparse_linear(*chosen, weights, biases, residual, adapter, adapter_scale)
    carried = checks.residual(residual, adapter, rows, outputs, weights[0].dtype, adapter_scale)
    along = Along(residual, adapter, adapter_scale, carried)
    product = Product.of(plan, weights, biases, 1, [adapter])
    result = x.new_empty(rows, outputs)
    macros = {**product.macros, "ALONE": flag(True), **selection_macros("AS_IS", width, SPARSE_THREADS, None, score)}
    grid = replace(product.grid, x=product.grid.x + plan.cluster)
    for row in range(rows):
        added, format_ = along.arguments(row)
        operands = address(x[row:]), c_int(width), c_int(k), Vector.of("score", score, width), product.matrices
        arguments = (*operands, *added, address(board), address(result[row:]))
        with launch.early_launches(False) if row else nullcontext():  # blocks of one row at a time have the board
            launch.run(x, "top_k_linear_cut.cu", "top_k_linear_cut", {**macros, **format_}, grid, arguments)
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
        plan = swiglu_plan(launch.machine(x.device), outputs, k, weights[0].element_size())
    else:
        plan = fused_plan(launch.machine(x.device), sizes, k, weights[0].element_size())
    if plan is None or not k or width > WIDEST_FUSED:
        linear = sparse_linear(*select(source, x, width, k, score, gain, eps), weights, biases, residual)
        return silu_mul(linear) if swiglu else linear
    checks.residual(residual, None, rows, outputs)
    product = Product.of(plan, weights, biases, rows, swiglu=swiglu)
    outputs //= 1 + swiglu
    result = x.new_empty(rows, outputs)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, width)
    arguments = (address(x), c_int(width), c_int(k), *vectors, product.matrices)
    macros = {
        **product.macros,
        **selection_macros(source, width, SPARSE_THREADS, gain, score),
        "MOST_KEPT": str(-(-k // KEPT_STEP) * KEPT_STEP),
    }
    last = (address(residual), address(result), c_int(outputs))
    launch.run(x, "top_k_linear.cu", "top_k_linear", macros, product.grid, (*arguments, *last))
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
    checks.vector("score", score, width)
    outputs = checks.matrices(weights, biases, width, column_major=True)
    carried = checks.residual(residual, adapter, rows, outputs, weights[0].dtype, adapter_scale)
    sizes, element = [len(weight) for weight in weights], weights[0].element_size()
    if swiglu:
        checks.gate_and_up(sizes)
    plan = above_plan(launch.machine(x.device), sizes, width, element, swiglu=swiglu, carries=adapter is not None)
    if plan is None or width > (WIDEST_COMPARED if source == "AS_IS" else WIDEST_FUSED):
        values, indices, count = compare(source, x, width, threshold, score, gain, eps)
        linear = sparse_linear(values, indices, weights, biases, residual, adapter, adapter_scale, count)
        return silu_mul(linear) if swiglu else linear
    product = Product.of(plan, weights, biases, rows, [] if adapter is None else [adapter], swiglu)
    outputs //= 1 + swiglu
    result = x.new_empty(rows, outputs)
    macros = {
        **product.macros,
        **selection_macros(source, width, SPARSE_THREADS, gain, score),
        **{"ADAPTER": flag(adapter is not None), "ALONE": flag(True), "COLUMNS_EACH": "1"},
    }
    along, format_ = adapter_arguments(residual, adapter, adapter_scale, carried)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, width)
    last = address(result), c_int(outputs)
    arguments = (address(x), c_int(width), c_float(threshold), *vectors, product.matrices, *along, *last)
    launch.run(x, "above_linear.cu", "above_linear", {**macros, **format_}, product.grid, arguments)
    return result
