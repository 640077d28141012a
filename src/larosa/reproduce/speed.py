"""Decoding speed of a model's own shape, by the rows of `larosa bench decode`."""

from __future__ import annotations

from typing import Any

import torch

from larosa.benchmarks.decode import DENSE, measure_config
from larosa.benchmarks.gpu_decode import measure_gpu_config
from larosa.benchmarks.gpu_rows import COMPILED, TEAL
from larosa.benchmarks.gpu_timing import gpu_machine
from larosa.benchmarks.machine import machine
from larosa.reproduce.context import Context
from larosa.reproduce.results import Cell, Column

#: The paper's prompts have so many tokens.
PROMPT_TOKENS = 128

#: What a table says of a decoder before its speedup; `cells` fills them.
COLUMNS = (
    Column("decoder"),
    Column("sparsity", ".0%"),
    Column("tokens/s", ".1f"),
    Column("ms per token", ".3f"),
    Column("95% of tokens below", ".3f"),
    Column("floor's share", ".0%"),
)


def decoding(
    context: Context, sparsities: tuple[float, ...], tokens: int, teal_sparsities: tuple[float, ...] = ()
) -> dict[str, Any]:
    """A decode benchmark of the model's shape with random weights, as JSON; `teal_sparsities` are for a GPU alone.

    Raises:
        LarosaError: too little memory, or a model that the engine does not run.
    """
    device = torch.device(context.device)
    on_gpu = device.type == "cuda"
    kv_cache_dtype = context.settings.kv_cache_dtype
    options: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "tokens": tokens, "kv_cache_dtype": kv_cache_dtype}
    request = {
        "sparsities": list(sparsities),
        "teal_sparsities": list(teal_sparsities) if on_gpu else [],
        "machine": gpu_machine(device) if on_gpu else machine(),
        **options,
    }

    def measure() -> dict[str, Any]:
        context.release()
        options["dtype"] = _dtype(context)
        if not on_gpu:
            return measure_config(context.path, context.config, sparsities, **options).to_dict()
        options.update(device=device, teal_sparsities=teal_sparsities)
        return measure_gpu_config(context.path, context.config, sparsities, **options).to_dict()

    return context.measure("decode", request, measure)


def baseline(found: dict[str, Any]) -> dict[str, Any]:
    """The row that speedups are over."""
    return next(row for row in found["rows"] if row["row"] == (COMPILED if _is_of_gpu(found) else DENSE))


def label(row: dict[str, Any]) -> str:
    """What a row is called, without its sparsity."""
    return "TEAL" if row["row"] == TEAL else str(row["row"])


def cells(row: dict[str, Any]) -> list[Cell]:
    """A row under `COLUMNS`."""
    numbers = ("sparsity", "tokens_per_second", "ms_per_token", "ms_per_token_p95", "floor_fraction")
    return [label(row), *(row[key] for key in numbers)]


def notes(found: dict[str, Any]) -> list[str]:
    """What was measured on what."""
    ran, base = found["machine"], baseline(found)
    if _is_of_gpu(found):
        where = [
            f"On one {ran['gpu']}, torch {ran['torch']}, {ran['kernels']} kernels, which read "
            f"{found['bandwidth'] / 1e12:.2f} TB/s.",
            "Speedups are over compiled PyTorch: a plain decoder under torch.compile with CUDA graphs, which attends "
            "to all of its cache. The engine is this package's.",
        ]
    else:
        where = [
            f"On the CPU, {ran['cpu']}, {ran['threads']} threads, torch {ran['torch']}, which read "
            f"{found['bandwidth'] / 1e9:.1f} GB/s; the paper's speeds are of GPUs.",
            "Speedups are over the engine dense: this package's decode engine, which runs LaRoSA too, reading every "
            "weight.",
        ]
    return [
        *where,
        f"Weights are random, which takes as long as trained ones; the shape is the model's, in {base['dtype']}. "
        "LaRoSA has residual adapters, and the score vectors of recipe best.",
        f"Times are of single tokens after a prompt of {base['prompt_tokens']}, which is not counted; tokens a second "
        "by their median. Decoders take turns. The floor is the time to read the bytes that a token needs, at the "
        "bandwidth measured in the same run.",
        *(["The engine keeps keys and values in int8."] if found["rows"][-1]["kv_cache_dtype"] == "int8" else []),
    ]


def _is_of_gpu(found: dict[str, Any]) -> bool:
    return "gpu" in found["machine"]


def _dtype(context: Context) -> torch.dtype:
    chosen = context.settings.dtype
    return getattr(torch, chosen) if chosen != "auto" else context.config.dtype or torch.float32
