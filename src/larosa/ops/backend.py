"""Which kernels serve tensors on a GPU, and whether they can: the only place where that is decided.

`LAROSA_CUDA_KERNELS=cuda`, the default, takes CUDA C++ (NVIDIA, compute capability 8.0 or newer, the extra
`larosa[cuda]`); `LAROSA_CUDA_KERNELS=triton` the portable ones in Triton. Neither stands in for the other.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from larosa.errors import LarosaError
from larosa.ops.cpu.library import load
from larosa.ops.cuda.compiler import check_compiler
from larosa.ops.cuda.launch import machine
from larosa.ops.cuda.parameters import check_codes
from larosa.ops.schema import implement

_MODULES = {"cuda": "larosa.ops.cuda.kernels", "triton": "larosa.ops.triton.kernels"}
_PACKAGES = {"cuda": "'larosa[cuda]'", "triton": "triton"}
OPERATORS = (
    *("rms_norm", "silu_mul", "top_k", "rms_norm_top_k", "silu_mul_top_k"),
    *("above", "rms_norm_above", "silu_mul_above"),
    *("linear", "sparse_linear", "top_k_linear", "rms_norm_top_k_linear", "rms_norm_top_k_swiglu"),
    *("above_linear", "rms_norm_above_linear", "rms_norm_above_swiglu", "low_bit_linear", "low_bit_site"),
    *("attend", "greedy", "embed"),
)


def chosen_kernels() -> str:
    """ "cuda" or "triton", as `LAROSA_CUDA_KERNELS` says.

    Raises:
        LarosaError: it says something else.
    """
    name = os.environ.get("LAROSA_CUDA_KERNELS") or "cuda"
    if name not in _MODULES:
        raise LarosaError(f"LAROSA_CUDA_KERNELS={name} is unknown: set it to {' or '.join(_MODULES)}")
    return name


@cache
def _kernels() -> ModuleType:
    name = chosen_kernels()
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise LarosaError(
            f"LAROSA_CUDA_KERNELS={name} needs a package that is not here ({error}): pip install {_PACKAGES[name]}"
        ) from error


def check_kernels(device: torch.device, forms: Iterable[str] = ()) -> None:
    """Make sure that operators can run on a device, before anybody lays out weights for them.

    Args:
        device: where they are to run.
        forms: names of the formats of few bits that weights have.

    Raises:
        LarosaError: a part of larosa or a package is not installed, the GPU is not one that the kernels run on, or they
            do not read such weights.
    """
    if device.type == "cpu":
        load()
        return
    in_cuda = chosen_kernels() == "cuda"
    for form in forms if in_cuda else ():
        check_codes(form)
    _kernels()
    if in_cuda:
        check_compiler()
        machine(device)


def _register(operator: str) -> None:
    def kernel(*args: Any, **options: Any) -> Any:
        return getattr(_kernels(), operator)(*args, **options)

    implement(operator, "CUDA")(kernel)


for _operator in OPERATORS:
    _register(_operator)
