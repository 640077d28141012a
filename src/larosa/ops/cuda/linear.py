"""Products with weights in the model's own dtype, of listed columns or of all."""

from __future__ import annotations

from ctypes import c_int
from dataclasses import replace
from typing import NamedTuple

import torch

from larosa.ops import checks
from larosa.ops.cuda import launch
from larosa.ops.cuda.parameters import TYPE_NAMES, Matrices, address, flag
from larosa.ops.cuda.plan import alone_plan, linear_plan, sparse_plan, together
from larosa.ops.cuda.product import Product, adapter_arguments, aligned
from larosa.ops.linear import Biases, Weights


def linear(x: torch.Tensor, weights: Weights, biases: Biases, residual: torch.Tensor | None = None) -> torch.Tensor:
    """See `linear_reference`; the weights are row-major."""
    rows, width = checks.vectors("x", x)
    outputs = checks.matrices(weights, biases, width, column_major=False)
    checks.residual(residual, None, rows, outputs)
    result = x.new_empty(rows, outputs)
    element, gpu = weights[0].element_size(), launch.machine(x.device)
    macros = {"WEIGHT": TYPE_NAMES[weights[0].dtype], "ALIGNED": aligned(weights, [width], along=0)}
    for part in _parts(rows, together(16 // element)):
        plan = linear_plan(gpu, len(part))
        matrices, tiles = Matrices.of(weights, biases, plan.tile, along=0)
        added = None if residual is None else residual[part.start :]
        arguments = (address(x[part.start :]), c_int(width), matrices, address(added), address(result[part.start :]))
        sizes = {"ROWS": str(len(part)), "CHUNK": str(plan.chunk)}
        grid = launch.Grid(plan.blocks(gpu, tiles), 1, plan.threads)
        launch.run(x, "linear.cu", "linear", {**macros, **sizes}, grid, (*arguments, c_int(outputs), c_int(tiles)))
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
    sizes, gpu, element = [len(weight) for weight in weights], launch.machine(values.device), weights[0].element_size()
    listed = k if count is None else k // 2  # what the host can only guess
    alone = None if adapter is None else alone_plan(gpu, sizes, listed, element)
    plan = alone or sparse_plan(gpu, sizes, listed, element)
    product = Product.of(plan, weights, biases, rows, [] if adapter is None else [adapter])
    along = Along(residual, adapter, adapter_scale, carried)
    return multiply(values, indices, count, product, outputs, along, alone is not None, 16 // element)


class Along(NamedTuple):
    """What is added to a product: a residual, or that of so many entries through its adapter."""

    residual: torch.Tensor | None
    adapter: torch.Tensor | None
    scale: torch.Tensor | None
    carried: int

    def arguments(self, row: int) -> tuple[list[launch.Argument], dict[str, str]]:
        """As of `adapter_arguments`, from a row on."""
        residual = None if self.residual is None else self.residual[row:]
        return adapter_arguments(residual, self.adapter, self.scale, self.carried)


def multiply(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    count: torch.Tensor | None,
    product: Product,
    outputs: int,
    along: Along,
    alone: bool,
    width: int,
    each: int = 1,
) -> torch.Tensor:
    """The product, of which a thread has `width` weights in 16 bytes: of several rows at once where all are whole.

    Without indices each value is for `each` columns.
    """
    rows, k = len(values), each * values.shape[1]
    result = values.new_empty(rows, outputs)
    macros = {**product.macros, "ADAPTER": flag(along.adapter is not None), "ALONE": flag(alone)}
    macros["COLUMNS_EACH"] = str(each)
    whole = indices is None and count is None
    for part in _parts(rows, together(width)) if whole else [range(rows)]:
        added, format_ = along.arguments(part.start)
        operands = address(values[part.start :]), address(indices), c_int(k), address(count), product.matrices
        arguments = (*operands, *added, address(result[part.start :]), c_int(outputs))
        grid = replace(product.grid, y=1) if whole else product.grid
        at_once = {"ROWS": str(len(part) if whole else 1)}
        launch.run(values, "sparse_linear.cu", "sparse_linear", {**macros, **format_, **at_once}, grid, arguments)
    return result
