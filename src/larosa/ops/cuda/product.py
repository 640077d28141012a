"""What kernels that multiply take: matrices, divided over a GPU, and an adapter that is read along."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_uint
from dataclasses import dataclass

import torch

from larosa.errors import LarosaError
from larosa.formats import FORMATS
from larosa.ops.cuda.launch import Argument, Grid
from larosa.ops.cuda.parameters import TYPE_NAMES, Matrices, address, check_codes, flag
from larosa.ops.cuda.plan import SPARSE_THREADS, SparsePlan
from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import LowBitWeights


@dataclass(frozen=True)
class Product:
    """How the columns of matrices are divided over a GPU, as the kernels that read listed columns take it."""

    matrices: Matrices
    grid: Grid
    macros: dict[str, str]

    @classmethod
    def of(
        cls,
        plan: SparsePlan,
        weights: Weights,
        biases: Biases,
        rows: int,
        more: Sequence[torch.Tensor] = (),
        swiglu: bool = False,
    ) -> Product:
        """For so many rows of x; `more` are matrices with as many outputs that are read along.

        For `swiglu` half of a tile's outputs are of the first matrix, half of the second.

        Raises:
            LarosaError: a matrix is too large.
        """
        matrices = [*weights, *more]
        if any(matrix.stride(1) * matrix.shape[1] >= 2**32 for matrix in matrices):
            raise LarosaError(
                "the CUDA kernels read matrices of less than 2^32 elements: set LAROSA_CUDA_KERNELS=triton"
            )
        packed, tiles = Matrices.of(weights, biases, plan.tile // (1 + swiglu), along=1)
        whole = aligned(matrices, [len(weight) for weight in weights], along=1)
        return cls._divided(
            plan, packed, tiles, rows, swiglu, {"WEIGHT": TYPE_NAMES[weights[0].dtype], "ALIGNED": whole}
        )

    @classmethod
    def of_codes(
        cls,
        plan: SparsePlan,
        weights: LowBitWeights,
        biases: Biases,
        rows: int,
        adapter: torch.Tensor | None = None,
        swiglu: bool = False,
    ) -> Product:
        """The same for codes with scales; an adapter is read along."""
        packed, tiles = Matrices.of_codes(weights, biases, plan.tile // (1 + swiglu))
        macros = {
            "WEIGHT": check_codes(weights.form),
            "ALIGNED": _codes_aligned(weights, adapter),
            "LOADS": str(plan.loads),
        }
        return cls._divided(plan, packed, tiles, rows, swiglu, macros)

    @classmethod
    def _divided(
        cls, plan: SparsePlan, packed: Matrices, tiles: int, rows: int, swiglu: bool, macros: dict[str, str]
    ) -> Product:
        tiles //= 1 + swiglu
        macros |= {"LANES": str(plan.lanes), "CLUSTER": str(plan.cluster), "SWIGLU": flag(swiglu)}
        return cls(packed, Grid(tiles * plan.cluster, rows, SPARSE_THREADS, plan.cluster), macros)


def adapter_arguments(
    residual: torch.Tensor | None, adapter: torch.Tensor | None, scale: torch.Tensor | None, carried: int
) -> tuple[list[Argument], dict[str, str]]:
    """What a kernel takes for a residual of so many entries and its adapter, and what its file is told of them."""
    stride = 0 if adapter is None else adapter.stride(1)
    arguments: list[Argument] = [address(residual), address(adapter), c_uint(stride), c_int(carried)]
    if adapter is None:
        return arguments, {}
    if scale is None:
        return arguments, {"CARRIED": TYPE_NAMES[adapter.dtype]}
    return [*arguments, c_int(adapter.shape[1]), address(scale)], {"SCALE": TYPE_NAMES[scale.dtype]}


def codes_width(form: str) -> int:
    """How many codes of a format 16 bytes hold."""
    return 128 // FORMATS[form].bits


def _codes_aligned(weights: LowBitWeights, adapter: torch.Tensor | None) -> str:
    width = codes_width(weights.form)
    whole = all(size % width == 0 for size in weights.outputs)
    placed = all(each.data_ptr() % 16 == 0 and each.stride(0) % 16 == 0 for each in weights.codes)
    if adapter is not None:
        placed = (
            placed and adapter.data_ptr() % (width * adapter.element_size()) == 0 and adapter.stride(1) % width == 0
        )
    return flag(whole and placed)


def aligned(weights: Weights, sizes: Sequence[int], along: int) -> str:
    """Whether every piece of rows or columns of those sizes is whole, as C++ writes it.

    Pieces are 16 bytes of the first matrix, and as many elements of the others.
    """
    piece = 16 // weights[0].element_size()
    whole = all(size % piece == 0 for size in sizes)
    placed = all(
        weight.data_ptr() % (piece * weight.element_size()) == 0 and weight.stride(along) % piece == 0
        for weight in weights
    )
    return flag(whole and placed)
