"""The C++ library: found, loaded and set up once, at the first call of an operator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from larosa.errors import LarosaError
from larosa.ops import cpu

#: Forces an instruction set, one of `ISAS`. Without it the widest that the processor has.
ISA_VARIABLE = "LAROSA_CPU_ISA"
ISAS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondotprod")

#: `LAROSA_INTERFACE` of larosa_cpu.h, which `_SIGNATURES` and the structures here are of.
INTERFACE = 6

_NAMES = ("liblarosa_cpu.so", "liblarosa_cpu.dylib")


class Vector(ctypes.Structure):
    """`larosa_vector` of larosa_cpu.h."""

    _fields_ = (("data", c_void_p), ("dtype", c_int64))


class Attention(ctypes.Structure):
    """`larosa_attention` of larosa_cpu.h."""

    _fields_ = (
        ("qkv", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("position", c_void_p),
        ("cache", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_gain", Vector),
        ("k_gain", Vector),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("capacity", c_int64),
        ("size", c_int64),
        ("dtype", c_int64),
        ("window", c_int64),
        ("rows", c_int64),
        ("caches", c_int64),
        ("eps", c_double),
        ("scale", c_double),
    )


# Result and arguments of each function of larosa_cpu.h. Structures that are packed by the caller are char pointers.
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "interface": (c_int64, ()),
    "isa": (c_void_p, ()),
    "set_isa": (c_int, (c_char_p,)),
    "share_openmp": (None, (c_void_p,)),
    "rms_norm": (None, (c_void_p, c_char_p, c_double, c_int64, c_int64, c_void_p)),
    "silu_mul": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "top_k": (None, (c_void_p, c_int64, c_int64, c_int64, c_char_p, c_void_p, c_void_p)),
    "rms_norm_top_k": (
        None,
        (c_void_p, c_char_p, c_double, c_int64, c_int64, c_int64, c_char_p, c_void_p, c_void_p),
    ),
    "silu_mul_top_k": (None, (c_void_p, c_int64, c_int64, c_int64, c_char_p, c_void_p, c_void_p)),
    "above": (None, (c_void_p, c_int64, c_int64, c_int64, c_float, c_char_p, c_void_p, c_void_p, c_void_p)),
    "rms_norm_above": (
        None,
        (c_void_p, c_char_p, c_double, c_int64, c_int64, c_int64, c_float, c_char_p, c_void_p, c_void_p, c_void_p),
    ),
    "silu_mul_above": (None, (c_void_p, c_int64, c_int64, c_int64, c_float, c_char_p, c_void_p, c_void_p, c_void_p)),
    "linear": (c_int, (c_void_p, c_int64, c_int64, c_char_p, c_int64, c_void_p, c_void_p, c_int64)),
    "linear_meanwhile": (c_int, (c_void_p, c_int64, c_int64, c_char_p, c_int64, c_void_p, c_void_p, c_int64)),
    "sparse_linear": (
        c_int,
        (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_char_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64),
    ),
    "low_bit_linear": (
        c_int,
        (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_char_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64),
    ),
    "adapt": (c_int, (c_void_p, c_int64, c_int64, c_int64, c_char_p, c_void_p, c_int64)),
    "adapt_meanwhile": (c_int, (c_void_p, c_int64, c_int64, c_int64, c_char_p, c_void_p, c_int64)),
    "attend": (c_int, (POINTER(Attention), c_void_p, c_int64)),
    "replay": (c_int, (c_char_p, c_int64)),
}

#: What `larosa_replay` can call, in the order of `larosa_function`.
REPLAYED = (
    "rms_norm",
    "silu_mul",
    "top_k",
    "rms_norm_top_k",
    "silu_mul_top_k",
    "linear",
    "sparse_linear",
    "attend",
    "linear_meanwhile",
    "adapt",
    "adapt_meanwhile",
    "above",
    "rms_norm_above",
    "silu_mul_above",
    "low_bit_linear",
)


class Library:
    """The loaded library: each function of larosa_cpu.h under its name without the prefix.

    Raises:
        LarosaError: it was built from the header of another version.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        # Only of a library that has the function does anybody know what to call it with.
        if not hasattr(library, "larosa_interface") or library.larosa_interface() != INTERFACE:
            raise LarosaError(
                f"{path} was built from another version of larosa: install larosa once more "
                "(in a clone: pip install -e . --no-deps)"
            )
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"larosa_{name}")
            function.restype = result
            function.argtypes = arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., int]:
        raise AttributeError(f"larosa_cpu.h has no function larosa_{name}")


@cache
def load() -> Library:
    """The library, with its instruction set chosen and PyTorch's threads shared.

    Raises:
        LarosaError: larosa was installed without it or with that of another version, or LAROSA_CPU_ISA asks for what
            cannot be had.
    """
    library = Library(_find())
    if (isa := os.environ.get(ISA_VARIABLE)) is not None:
        _set_isa(library, isa, ISA_VARIABLE)
    share_threads(library, True)
    return library


def set_isa(isa: str) -> None:
    """Use the kernels of another instruction set, one of `ISAS`.

    Raises:
        LarosaError: it is not known, or this processor does not have it.
    """
    _set_isa(load(), isa, "instruction set")


def isa() -> str:
    """The instruction set in use."""
    return _isa(load())


def threads() -> str:
    """Whose threads the kernels run on: "openmp" for those that PyTorch runs on too, or "own"."""
    return "openmp" if _gomp_parallel() else "own"


def share_threads(library: Library, share: bool) -> None:
    """Run on PyTorch's threads where they are to be had, or on the library's own.

    Two pools would wait for work actively at the same time, each on as many cores as there are.
    """
    library.share_openmp(_gomp_parallel() if share else None)


def _set_isa(library: Library, isa: str, source: str) -> None:
    status = library.set_isa(isa.encode())
    if status == 1:
        raise LarosaError(f"{source} {isa!r} is not known: use one of {', '.join(ISAS)}")
    if status == 2:
        raise LarosaError(f"{source} {isa!r} is not supported by this processor: use {_isa(library)!r}")


def _isa(library: Library) -> str:
    return ctypes.string_at(library.isa()).decode()


@cache
def _gomp_parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP run-time library that PyTorch is linked with, if it has one."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def _find() -> Path:
    # An editable install has sources and compiled library in two folders of one package.
    for folder in cpu.__path__:
        for name in _NAMES:
            if (path := Path(folder) / name).is_file():
                return path
    raise LarosaError(
        "larosa was installed without its CPU kernels: install a C++ compiler (g++ or clang) and larosa once more"
    )
