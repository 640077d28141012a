"""`larosa bench`: speed, beside dense PyTorch and the time that reading alone takes."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

from larosa.benchmarks.kernels import KernelBenchmark, measure_kernels
from larosa.checkpoints.io import find_device
from larosa.cli import bench_gpu, options
from larosa.cli.bench_decode import decode
from larosa.cli.options import console
from larosa.cli.together import check_alone
from larosa.formats import WeightFormat

bench = typer.Typer(help="Measure speed beside dense PyTorch in the same run.", no_args_is_help=True)
bench.command()(decode)


@bench.command()
def kernels(
    device: options.Device = "auto",
    shape: Annotated[str, typer.Option(help="On a GPU: whose layer to measure.")] = "llama-2-7b",
    dtype: Annotated[options.Dtype, typer.Option(help="On a GPU: format of the weights.")] = options.Dtype.AUTO,
    weights: Annotated[
        WeightFormat | None, typer.Option(help="On a GPU: only products with weights of this format.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each row; the median is shown.")] = 20,
    seed: options.Seed = 0,
    json: options.JsonFile = None,
) -> None:
    """Time each operator of a decoding step on its own."""
    check_alone("bench kernels")
    where = find_device(device)
    options.check_json_file(json)
    if where.type == "cuda":
        number_format = torch.float16 if dtype is options.Dtype.AUTO else getattr(torch, dtype)
        bench_gpu.kernels(shape, where, json, dtype=number_format, weights=weights, rounds=rounds, seed=seed)
        return
    result = measure_kernels(rounds=rounds, seed=seed)
    console.print(options.machine_line(result.machine, result.bandwidth))
    options.print_whole(_table(result))
    if result.selection_share is not None:
        console.print(f"Selection takes {result.selection_share:.1%} of a layer of Llama-3.2-1B in bfloat16 at 50%.")
    options.write_json(json, result.to_dict())


def _table(result: KernelBenchmark) -> Table:
    table = Table(title="Median time of one call", title_justify="left")
    for column in ("kernel", "shape", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("sparsity", "time", "p10-p90", "floor", "of bandwidth", "PyTorch", "speedup"):
        table.add_column(column, justify="right")
    previous = result.rows[0]
    for row in result.rows:
        if (row.shape, row.dtype) != (previous.shape, previous.dtype):
            table.add_section()
        previous = row
        table.add_row(
            row.kernel,
            row.shape,
            row.dtype,
            f"{row.sparsity:.0%}",
            _milliseconds(row.time.median),
            f"{_milliseconds(row.time.low)}-{_milliseconds(row.time.high)}",
            _milliseconds(row.floor),
            f"{row.bandwidth_fraction:.0%}",
            _milliseconds(row.dense.median),
            f"{row.speedup:.2f}x",
        )
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"
