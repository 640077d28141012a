"""`larosa bench` on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from larosa.benchmarks.gpu_kernels import GpuKernelBenchmark, measure_gpu_kernels
from larosa.benchmarks.gpu_rows import GpuDecodeBenchmark
from larosa.cli import options
from larosa.cli.options import console


def show_decode(result: GpuDecodeBenchmark, json: Path | None) -> None:
    """Print what decoding took and write it."""
    console.print(options.machine_line(result.machine, result.bandwidth))
    options.print_whole(_decode_table(result))
    options.write_json(json, result.to_dict())


def kernels(shape: str, device: torch.device, json: Path | None, **settings: Any) -> None:
    """Measure a shape's operators, print them and write them; `settings` are those of `measure_gpu_kernels`."""
    result = measure_gpu_kernels(shape, device=device, **settings)
    console.print(options.machine_line(result.machine, result.bandwidth))
    options.print_whole(_kernel_table(result, shape))
    options.write_json(json, result.to_dict())


def _decode_table(result: GpuDecodeBenchmark) -> Table:
    first = result.rows[0]
    several = any(row.batch > 1 for row in result.rows)
    table = Table(
        title=f"{options.decode_title(result.rows[-1])}, {first.tokens} tokens after {first.prompt_tokens}, "
        f"time of one in ms{'; speedups of all texts together' if several else ''}",
        title_justify="left",
    )
    table.add_column("row", no_wrap=True)
    # What several texts read together is not known, so that they have no floor.
    own = ("texts", "of all") if several else ("floor", "of floor")
    for column in ("sparsity", "tokens/s", "median", "p95", *own, "speedup", "over TEAL"):
        table.add_column(column, justify="right")
    for row in result.rows:
        floor = f"{row.floor_ms:.3f}", f"{row.floor_fraction:.0%}"
        table.add_row(
            row.row,
            f"{row.sparsity:.0%}",
            f"{row.tokens_per_second:.1f}",
            f"{row.ms_per_token:.3f}",
            f"{row.ms_per_token_p95:.3f}",
            *((str(row.batch), f"{row.total_tokens_per_second:.1f}") if several else floor),
            f"{row.speedup:.2f}x",
            "" if row.speedup_over_teal is None else f"{row.speedup_over_teal:.2f}x",
        )
    return table


def _kernel_table(result: GpuKernelBenchmark, shape: str) -> Table:
    table = Table(title=f"{shape}, median time of one call in us", title_justify="left")
    for column in ("kernel", "shape", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("sparsity", "time", "p10-p90", "floor", "GB/s", "of bandwidth", "over PyTorch"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            row.kernel,
            row.shape,
            row.dtype,
            f"{row.sparsity:.0%}",
            f"{1e6 * row.time.median:.1f}",
            f"{1e6 * row.time.low:.1f}-{1e6 * row.time.high:.1f}",
            f"{1e6 * row.floor:.1f}",
            f"{row.bandwidth_fraction * result.bandwidth / 1e9:.0f}",
            f"{row.bandwidth_fraction:.0%}",
            "" if row.speedup is None else f"{row.speedup:.2f}x",
        )
    return table
