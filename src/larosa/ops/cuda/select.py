"""Which entries of a vector are kept: by one block of a kernel of its own."""

from __future__ import annotations

from ctypes import c_float, c_int

import torch

from larosa.errors import LarosaError
from larosa.ops import checks
from larosa.ops.cuda import launch
from larosa.ops.cuda.parameters import TYPE_NAMES, Vector, address, flag
from larosa.ops.cuda.plan import ROW_THREADS
from larosa.ops.select import CountedSelection, Selection, columns_each

_WIDEST = 32 * ROW_THREADS
#: Of an MLP's vector so wide, whose product takes an adapter along: of longer ones the selection takes longer than
#: reading the adapter does, which then is in the way of the selection's loads.
_EARLY = (8192, 16384)


def top_k(x: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """See `top_k_reference`."""
    _, width = checks.vectors("x", x)
    return select("AS_IS", x, width, k, score)


def rms_norm_top_k(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, k: int, score: torch.Tensor | None = None
) -> Selection:
    """See `rms_norm_top_k_reference`."""
    _, width = checks.vectors("x", x)
    return select("NORMED", x, width, k, score, gain, eps)


def silu_mul_top_k(gate_up: torch.Tensor, k: int, score: torch.Tensor | None = None) -> Selection:
    """See `silu_mul_top_k_reference`."""
    return select("GATED", gate_up, checks.halves("gate_up", gate_up), k, score)


def above(x: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    """See `above_reference`."""
    _, width = checks.vectors("x", x)
    return compare("AS_IS", x, width, threshold, score)


def rms_norm_above(
    x: torch.Tensor, gain: torch.Tensor | None, eps: float, threshold: float, score: torch.Tensor | None = None
) -> CountedSelection:
    """See `rms_norm_above_reference`."""
    _, width = checks.vectors("x", x)
    return compare("NORMED", x, width, threshold, score, gain, eps)


def silu_mul_above(gate_up: torch.Tensor, threshold: float, score: torch.Tensor | None = None) -> CountedSelection:
    """See `silu_mul_above_reference`."""
    return compare("GATED", gate_up, checks.halves("gate_up", gate_up), threshold, score)


def select(
    source: str,
    x: torch.Tensor,
    width: int,
    k: int,
    score: torch.Tensor | None,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> Selection:
    """The k largest of a source: of x as it is, of its norm, or of silu(gate) * up of its halves."""
    checks.kept(k, width)
    macros = _selecting_macros(source, width, gain, score)
    values, indices = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int32)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, width)
    arguments = (address(x), c_int(width), c_int(k), *vectors, address(values), address(indices))
    if k:
        launch.run(x, "select.cu", "select_top_k", macros, launch.Grid(len(x), 1, ROW_THREADS), arguments)
    return values, indices


def compare(
    source: str,
    x: torch.Tensor,
    width: int,
    threshold: float,
    score: torch.Tensor | None,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> CountedSelection:
    """The entries of a source above a threshold, or the columns of each that are by their scores; see `select`."""
    each, rows = 1 if score is None else columns_each(score, width), len(x)
    macros = _selecting_macros(source, width, gain, score) | {"COLUMNS_EACH": str(each)}
    values, indices = x.new_empty(rows, each * width), x.new_empty(rows, each * width, dtype=torch.int32)
    count = x.new_empty(rows, dtype=torch.int64)
    vectors = Vector.of("gain", gain, width), c_float(eps), Vector.of("score", score, each * width)
    results = address(values), address(indices), address(count)
    arguments = (address(x), c_int(width), c_float(threshold), *vectors, *results)
    launch.run(x, "above.cu", "select_above", macros, launch.Grid(rows, 1, ROW_THREADS), arguments)
    return values, indices, count


def _selecting_macros(source: str, width: int, gain: torch.Tensor | None, score: torch.Tensor | None) -> dict[str, str]:
    """What a kernel is told that selects by one block of its own."""
    if width > _WIDEST:
        raise LarosaError(
            f"the CUDA kernels select from at most {_WIDEST} entries, not {width}: set LAROSA_CUDA_KERNELS=triton"
        )
    early = source == "AS_IS" and _EARLY[0] < width <= _EARLY[1]
    return {
        "BLOCK": str(ROW_THREADS),
        "EARLY": flag(early),
        **selection_macros(source, width, ROW_THREADS, gain, score),
    }


def selection_macros(
    source: str, width: int, threads: int, gain: torch.Tensor | None, score: torch.Tensor | None
) -> dict[str, str]:
    """What any kernel is told that selects by blocks of so many threads."""
    formats = {
        name: "None" if vector is None else TYPE_NAMES[vector.dtype]
        for name, vector in (("GAIN", gain), ("SCORE", score))
    }
    return {"SOURCE": source, "EACH": str(-(-width // threads)), "FILLED": flag(width % threads == 0), **formats}
