"""What each entry of a vector becomes, and which of the logits is largest."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong

import torch

from larosa.ops import checks
from larosa.ops.cuda import launch
from larosa.ops.cuda.parameters import TYPE_NAMES, Vector, address
from larosa.ops.cuda.plan import ROW_THREADS

_GREEDY_BLOCKS = 8


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See `rms_norm_reference`."""
    rows, width = checks.vectors("x", x)
    result = torch.empty_like(x)
    arguments = (address(x), c_int(width), Vector.of("gain", gain, width), c_float(eps), address(result))
    launch.run(x, "elementwise.cu", "rms_norm", {}, launch.Grid(rows, 1, ROW_THREADS), arguments)
    return result


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `silu_mul_reference`."""
    rows, width = len(gate_up), checks.halves("gate_up", gate_up)
    result = gate_up.new_empty(rows, width)
    arguments = (address(gate_up), c_int(width), address(result))
    launch.run(
        gate_up, "elementwise.cu", "silu_mul", {}, launch.Grid(-(-width // ROW_THREADS), rows, ROW_THREADS), arguments
    )
    return result


def embed(embedding: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `embed_reference`. A token that the embedding does not have gives NaN."""
    vocabulary, width = embedding.shape
    if embedding.dtype not in TYPE_NAMES or not embedding.is_contiguous():
        raise ValueError("embedding must be contiguous, and float32, bfloat16 or float16")
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or not tokens.is_contiguous():
        raise ValueError("tokens must be contiguous int64 of one dimension")
    result = embedding.new_empty(len(tokens), width, dtype=torch.float32)
    table = Vector.of("embedding", embedding.view(-1), embedding.numel())
    arguments = (table, c_longlong(vocabulary), c_int(width), address(tokens), address(result))
    launch.run(
        embedding,
        "elementwise.cu",
        "embed",
        {},
        launch.Grid(-(-width // ROW_THREADS), len(tokens), ROW_THREADS),
        arguments,
    )
    return result


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See `greedy_reference`."""
    rows, vocabulary = checks.vectors("logits", logits)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    cluster = _GREEDY_BLOCKS if launch.machine(logits.device).overlaps else 1
    arguments = (address(logits), c_int(vocabulary), address(tokens))
    launch.run(
        logits,
        "greedy.cu",
        "greedy",
        {"CLUSTER": str(cluster)},
        launch.Grid(cluster, rows, ROW_THREADS, cluster),
        arguments,
    )
    return tokens
