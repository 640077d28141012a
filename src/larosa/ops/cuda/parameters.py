"""The structures of `source/vectors.cuh` and `source/attention.cuh`, as the kernels take them."""

from __future__ import annotations

import ctypes

import torch

from larosa.errors import LarosaError
from larosa.formats import Int4, Int8
from larosa.ops import checks
from larosa.ops.linear import Biases, Weights
from larosa.ops.low_bit import LowBitWeights

#: What the kernels call the formats of weights and caches.
TYPE_NAMES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}
#: The same of codes, by the name of their format.
_CODE_NAMES = {form.name: form.__name__ for form in (Int8, Int4)}
_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST_MATRICES = 4
_BEYOND = 2**40  # more tiles than any matrix has


class Vector(ctypes.Structure):
    """A vector of any of the three formats, or none."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_longlong))

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor | None, size: int) -> Vector:
        """`tensor`, checked to be [size]; `name` is for the error."""
        checked = checks.vector(name, tensor, size)
        return cls(None, 0) if checked is None else cls(checked.data_ptr(), _TYPE_CODES[checked.dtype])


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("bias", Vector),
        ("stride", ctypes.c_longlong),
        ("outputs", ctypes.c_longlong),
        ("first", ctypes.c_longlong),
        ("tile", ctypes.c_longlong),
        ("scales", ctypes.c_void_p),
        ("scale_stride", ctypes.c_longlong),
        ("group", ctypes.c_longlong),
    )


class Matrices(ctypes.Structure):
    """The matrices of one product, each with its place among all outputs and all tiles of outputs."""

    _fields_ = (("matrix", _Matrix * _MOST_MATRICES),)

    @classmethod
    def of(cls, weights: Weights, biases: Biases, tile: int, along: int) -> tuple[Matrices, int]:
        """`weights` in tiles of `tile` outputs, and the number of tiles; `along` is the dimension that strides."""
        return cls._of(
            weights, [weight.stride(along) for weight in weights], [len(each) for each in weights], biases, tile
        )

    @classmethod
    def of_codes(cls, weights: LowBitWeights, biases: Biases, tile: int) -> tuple[Matrices, int]:
        """The same for codes with scales, columns of which stride."""
        strides = [codes.stride(0) for codes in weights.codes]
        matrices, tiles = cls._of(weights.codes, strides, weights.outputs, biases, tile)
        for matrix, scales in zip(matrices.matrix, weights.scales, strict=False):
            matrix.scales, matrix.scale_stride, matrix.group = scales.data_ptr(), scales.stride(0), weights.group
        return matrices, tiles

    @classmethod
    def _of(
        cls, weights: Weights, strides: list[int], sizes: list[int], biases: Biases, tile: int
    ) -> tuple[Matrices, int]:
        if len(weights) > _MOST_MATRICES:
            raise LarosaError(
                f"the CUDA kernels multiply at most {_MOST_MATRICES} matrices at once, not {len(weights)}"
            )
        matrices = cls()
        outputs = tiles = 0
        for i, (weight, stride, size, bias) in enumerate(zip(weights, strides, sizes, biases, strict=True)):
            packed = Vector.of("bias", bias, size)
            matrices.matrix[i] = _Matrix(weight.data_ptr(), packed, stride, size, outputs, tiles)
            outputs += size
            tiles += -(-size // tile)
        for i in range(len(weights), _MOST_MATRICES):
            matrices.matrix[i] = _Matrix(None, Vector(), 0, 0, outputs, _BEYOND)
        return matrices, tiles


class Rotary(ctypes.Structure):
    """What happens to queries and keys before they meet."""

    _fields_ = (
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_gain", Vector),
        ("k_gain", Vector),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


def check_codes(form: str) -> str:
    """What the kernels call the codes of a format.

    Raises:
        LarosaError: they do not read them.
    """
    if form not in _CODE_NAMES:
        raise LarosaError(
            f"the CUDA kernels read weights of {' and '.join(_CODE_NAMES)}, not of {form}: "
            "set LAROSA_CUDA_KERNELS=triton"
        )
    return _CODE_NAMES[form]


def flag(wanted: bool) -> str:
    """`wanted`, as C++ writes it."""
    return str(wanted).lower()


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a tensor begins; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
