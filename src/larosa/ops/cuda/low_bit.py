"""Products with weights of few bits, by themselves and with the selection in front of them."""

from __future__ import annotations

from ctypes import c_float, c_int

import torch

from larosa.ops import checks
from larosa.ops.cuda import launch
from larosa.ops.cuda.elementwise import rms_norm, silu_mul
from larosa.ops.cuda.linear import Along, multiply
from larosa.ops.cuda.parameters import Vector, address, flag
from larosa.ops.cuda.plan import SPARSE_THREADS, low_bit_plan
from larosa.ops.cuda.product import Product, adapter_arguments, codes_width
from larosa.ops.cuda.select import compare, select, selection_macros
from larosa.ops.cuda.top_k_linear import KEPT_STEP, WIDEST_COMPARED, WIDEST_FUSED
from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import LowBitWeights

_BELOW_ALL = -1.0  # a threshold that all entries are above


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
    """See `low_bit_linear_reference`.

    With an adapter, the residual is read early: neither of the two kernels launched just before may write it.
    """
    weights, depth = LowBitWeights(codes, scales, outputs, group, form), len(codes[0]) if codes else 0
    rows, k, each = checks.listed_columns(values, indices, depth)
    checks.counts(count, rows)
    total = checks.low_bit(weights, biases, depth)
    carried = checks.residual(residual, adapter, rows, total, None, adapter_scale)
    listed, width = k if count is None else k // 2, codes_width(form)  # what the host can only guess
    plan = low_bit_plan(launch.machine(values.device), outputs, listed, width)
    assert plan is not None, "only those that select have none"
    product = Product.of_codes(plan, weights, biases, rows, adapter)
    teams = adapter is not None and SPARSE_THREADS // 2 % plan.lanes == 0
    along = Along(residual, adapter, adapter_scale, carried)
    return multiply(values, indices, count, product, total, along, teams, width, each)


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
    """See `low_bit_site_reference`. One launch where every block can select for itself, else one after the other.

    With an adapter, the residual is read early: neither of the two kernels launched just before may write it.
    """
    checks.site(k, threshold, eps, swiglu, outputs, residual, adapter)
    weights, source = LowBitWeights(codes, scales, outputs, group, form), "AS_IS" if eps is None else "NORMED"
    rows, width = checks.vectors("x", x)
    depth = len(codes[0]) if codes else 0
    each = checks.site_columns(x, depth, k, threshold, score)
    total, element = checks.low_bit(weights, biases, depth), codes_width(form)
    carried = checks.residual(residual, adapter, rows, total, None, adapter_scale)
    selects, everything = k is not None, k is None and threshold is None
    if everything:
        score = None
    widest = WIDEST_COMPARED if source == "AS_IS" and not selects else WIDEST_FUSED
    plan = None
    # All of x as it is has nothing to select, and what selects by count takes no adapter along.
    apart = (everything and eps is None) or (selects and adapter is not None)
    if k != 0 and width <= widest and not apart:
        listed = depth if everything else k or depth // 2
        plan = low_bit_plan(launch.machine(x.device), outputs, listed, element, k or depth)
    if plan is None:
        along = residual, adapter, adapter_scale
        return _low_bit_apart(x, gain, eps, score, k, threshold, swiglu, weights, biases, *along)
    product = Product.of_codes(plan, weights, biases, rows, adapter, swiglu)
    result = x.new_empty(rows, total // (1 + swiglu))
    vectors = Vector.of("gain", gain, width), c_float(eps or 0.0), Vector.of("score", score, depth)
    macros = {**product.macros, **selection_macros(source, width, SPARSE_THREADS, gain, score)}
    if k is not None:
        checks.kept(k, width)
        macros["MOST_KEPT"] = str(-(-k // KEPT_STEP) * KEPT_STEP)
        last = address(residual), address(result), c_int(result.shape[1])
        counted = address(x), c_int(width), c_int(k), *vectors, product.matrices, *last
        launch.run(x, "top_k_linear.cu", "top_k_linear", macros, product.grid, counted)
        return result
    carrying, format_ = adapter_arguments(residual, adapter, adapter_scale, carried)
    macros |= {"ADAPTER": flag(adapter is not None), "ALONE": flag(True), "COLUMNS_EACH": str(each), **format_}
    least = c_float(_BELOW_ALL if threshold is None else threshold)
    written = address(result), c_int(result.shape[1])
    compared = address(x), c_int(width), least, *vectors, product.matrices, *carrying, *written
    launch.run(x, "above_linear.cu", "above_linear", macros, product.grid, compared)
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
        x, indices = select(source, x, width, k, score, gain, eps or 0.0)
    elif threshold is not None:
        x, indices, count = compare(source, x, width, threshold, score, gain, eps or 0.0)
    elif eps is not None:
        x = rms_norm(x, gain, eps)
    result = low_bit_linear(x, indices, *weights, biases, residual, count, *along)
    return silu_mul(result) if swiglu else result
