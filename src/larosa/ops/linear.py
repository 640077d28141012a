"""Products of a vector with several weight matrices at once, dense, or sparse in the vector."""

from __future__ import annotations

import torch

from larosa.ops.adapter import adapt_reference
from larosa.ops.cpu.pages import empty_on_huge_pages
from larosa.ops.schema import define

Weights = list[torch.Tensor]
Biases = list[torch.Tensor | None]


@define("linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual=None) -> Tensor")
def _linear(x: torch.Tensor, weights: Weights, biases: Biases, residual: torch.Tensor | None = None) -> torch.Tensor:
    return _outputs(x, weights)


@define(
    "sparse_linear(Tensor values, Tensor? indices, Tensor[] weights, Tensor?[] biases, Tensor? residual=None, "
    "Tensor? adapter=None, Tensor? adapter_scale=None, Tensor? count=None) -> Tensor"
)
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
    return _outputs(values, weights)


def _outputs(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    return x.new_empty(len(x), sum(len(weight) for weight in weights))


def linear_reference(
    x: torch.Tensor, weights: Weights, biases: Biases, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + x W^T + b, the outputs of all matrices side by side.

    Args:
        x: [B, D], float32 (float64 for a reference).
        weights: matrices [N_i, D] of one dtype, float32, bfloat16 or float16. Kernels want them row-major.
        biases: one [N_i] or None a matrix.
        residual: [B, sum of N_i] like `x`, or None.

    Returns:
        [B, sum of N_i] like `x`.
    """
    outputs = [
        x @ weight.to(x.dtype).T + (0 if bias is None else bias.to(x.dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    result = torch.cat(outputs, dim=-1)
    return result if residual is None else residual + result


def sparse_linear_reference(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    weights: Weights,
    biases: Biases,
    residual: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    adapter_scale: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` of the vectors that have `values` at `indices` and are zero elsewhere.

    Only the columns of the weights at `indices` are read, so a NaN in another column does not show.

    Args:
        values: [B, k], float32 (float64 for a reference).
        indices: [B, k] int32, ascending in each row; None where values are of all columns, for a GPU's kernels alone.
        weights: matrices [N_i, D] of one dtype. Kernels want them column-major (see `column_major`).
        biases: one [N_i] or None a matrix.
        residual: [B, sum of N_i] like `values`, or None.
        adapter: [sum of N_i, M] like the weights, or None: the residual is then [B, M], and `residual` `adapter`^T is
            added instead of it. For a GPU's kernels alone, which want it column-major.
        adapter_scale: [sum of N_i] of any float dtype, or None: the adapter is then int8, and used as `adapt` has it.
        count: [B] int64, how many of the k entries of each row are meant, the first ones; None for all.

    Returns:
        [B, sum of N_i] like `values`.
    """
    meant = [values.shape[1]] * len(values) if count is None else count.tolist()
    if indices is None:
        indices = torch.arange(values.shape[1], device=values.device).expand_as(values)
    rows = [
        linear_reference(value[None, :k], [weight[:, index[:k].long()] for weight in weights], biases)
        for value, index, k in zip(values, indices, meant, strict=True)
    ]
    result = torch.cat([_outputs(values[:0], weights), *rows])  # cat of nothing is an error
    if residual is not None and adapter is not None:
        if adapter_scale is None:
            residual = linear_reference(residual, [adapter], [None])
        else:
            residual = adapt_reference(residual, adapter, adapter_scale)
    return result if residual is None else residual + result


def column_major(weight: torch.Tensor) -> torch.Tensor:
    """The same matrix [N, D] with each column in one piece in memory; `weight` itself where it is so already.

    On the CPU a copy lies on huge pages, where there are any.
    """
    columns = weight.t()
    if columns.is_contiguous():
        return weight
    if not weight.is_cpu:
        return columns.contiguous().t()
    return empty_on_huge_pages(columns.shape, weight.dtype).copy_(columns).t()
