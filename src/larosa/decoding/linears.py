"""The linears that read one vector, as the engine multiplies with them: their outputs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from larosa.formats import ColumnFormat
from larosa.models import Int8Adapter, QuantizedLinear
from larosa.ops import column_major
from larosa.ops.cpu.pages import rows_side_by_side
from larosa.quantizers import round_to_nearest

_ops: Any = torch.ops.larosa

#: A weight, and a scale if it is int8: what an adapter's residual goes through in the product that ends a branch.
Carried = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Linears:
    """Linears in the model's own dtype, over its own memory: all laid out by rows, or all by columns."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    by_columns: bool = False

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.weights[0].device

    def every(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Outputs [B, sum of N_i] for x [B, D], on top of a residual; of what stands by columns on a GPU alone."""
        if self.by_columns:
            return self.listed(x, None, residual, (None, None), None)
        by_rows: torch.Tensor = _ops.linear(x, self.weights, self.biases, residual)
        return by_rows

    def rounded(self, form: ColumnFormat, where: str) -> LowBitLinears:
        """A copy of few bits, each group of weights rounded by itself; `where` names them in errors."""
        codes, scales = zip(*(round_to_nearest(weight, form, where) for weight in self.weights), strict=True)
        parts = [*codes, *scales]
        if self.device.type == "cpu":
            parts = rows_side_by_side(parts)
        outputs, count = [len(weight) for weight in self.weights], len(codes)
        return LowBitLinears(parts[:count], parts[count:], outputs, form, self.biases)

    def listed(
        self,
        values: torch.Tensor,
        indices: torch.Tensor | None,
        residual: torch.Tensor | None,
        along: Carried,
        count: torch.Tensor | None,
    ) -> torch.Tensor:
        """Outputs for vectors that have `values` at `indices`, as many as `count` says: columns are read.

        Without indices all of them are, on a GPU.
        """
        inputs = values, indices, self.weights, self.biases, residual, *along
        by_columns: torch.Tensor = _ops.sparse_linear(*inputs, count)
        return by_columns


@dataclass(frozen=True)
class LowBitLinears:
    """Linears of few bits, over the model's own codes and scales."""

    codes: list[torch.Tensor]
    scales: list[torch.Tensor]
    outputs: list[int]
    form: ColumnFormat
    biases: list[torch.Tensor | None]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes[0].device

    def every(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """As of `Linears`, by columns."""
        return self.listed(x, None, residual, (None, None), None)

    def listed(
        self,
        values: torch.Tensor,
        indices: torch.Tensor | None,
        residual: torch.Tensor | None,
        along: Carried,
        count: torch.Tensor | None,
    ) -> torch.Tensor:
        """As of `Linears`, but without indices on every device."""
        outputs: torch.Tensor = _ops.low_bit_linear(values, indices, *self.weights, residual, count, *along)
        return outputs

    def selected(
        self,
        x: torch.Tensor,
        norm: tuple[torch.Tensor | None, float | None],
        kept: tuple[torch.Tensor | None, int | None, float | None],
        swiglu: bool,
        residual: torch.Tensor | None,
        along: Carried,
    ) -> torch.Tensor:
        """Outputs, or silu(gate) * up, for what is kept of x or its norm: score, and k, a threshold, or neither."""
        outputs: torch.Tensor = _ops.low_bit_site(x, *norm, *kept, swiglu, *self.weights, residual, *along)
        return outputs

    @property
    def weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int], int, str, list[torch.Tensor | None]]:
        """As operators take them."""
        return self.codes, self.scales, self.outputs, self.form.group, self.form.name, self.biases


def read_linears(linears: Sequence[Any], by_columns: bool) -> Linears | LowBitLinears:
    """The linears of a model that read one vector, in its own dtype or all of one format.

    Weights in the model's dtype are laid out in place, by columns or by rows; few bits stand by columns anyway, and on
    a CPU those of one column of all linears are put side by side.
    """
    first = linears[0]
    biases = [own(linear.bias) for linear in linears]
    if not isinstance(first, QuantizedLinear):
        for linear in linears:
            lay_out(linear, by_columns)
        return Linears([linear.weight.data for linear in linears], biases, by_columns)
    parts = [linear.codes for linear in linears] + [linear.scales for linear in linears]
    if parts[0].is_cpu:
        for part, laid_out in zip(parts, rows_side_by_side([part.data for part in parts]), strict=True):
            part.data = laid_out
    codes, scales = [linear.codes.data for linear in linears], [linear.scales.data for linear in linears]
    outputs = [linear.out_features for linear in linears]
    return LowBitLinears(codes, scales, outputs, first.format, biases)


def lay_out(linear: nn.Linear | Int8Adapter, by_columns: bool) -> None:
    """Store a weight by columns or by rows, its values as they are."""
    linear.weight.data = column_major(linear.weight.data) if by_columns else linear.weight.data.contiguous()


def own(weight: torch.Tensor | None) -> torch.Tensor | None:
    """The memory of a parameter, which stays even if the parameter gets another."""
    return None if weight is None else weight.data
