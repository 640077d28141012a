"""`larosa demo`: what rotation buys, and what skipping weights does, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from larosa.benchmarks.decode import DecodeBenchmark
from larosa.cli import options
from larosa.cli.options import console
from larosa.demo.quality import DemoRow, plot_demo, run_demo
from larosa.demo.speed import SPEED_NOTE, run_speed_demo


def demo(
    output: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("demo.png"),
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.JsonFile = None,
) -> None:
    """Compare dense, Top-K and LaRoSA on the bundled model and text, and time decoding on the CPU."""
    options.check_json_file(json)
    rows = run_demo(seed=seed, device=device)
    console.print(_table(rows))
    plot_demo(rows, output)
    console.print(f"Picture: {output}")
    speed = run_speed_demo()
    console.print(_speed_table(speed))
    console.print(SPEED_NOTE)
    options.write_json(
        json,
        {
            "rows": [row.to_dict() for row in rows],
            "speed": [row.to_dict() for result in speed for row in result.rows],
        },
    )


def _table(rows: list[DemoRow]) -> Table:
    table = Table(title="larosa-tiny on the bundled text", title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("sparsity", "perplexity", "KL to dense", "top-1"):
        table.add_column(column, justify="right")
    for previous, row in zip([rows[0], *rows], rows, strict=False):
        if row.method != previous.method:
            table.add_section()
        table.add_row(
            row.method,
            f"{row.sparsity:.0%}",
            f"{row.perplexity:.2f}",
            f"{row.kl_divergence:.4f}",
            f"{row.top1_agreement:.1%}",
        )
    return table


def _speed_table(results: list[DecodeBenchmark]) -> Table:
    first = results[0].rows[0]
    table = Table(title=f"Decoding on the CPU, {first.dtype}, threads: {first.threads}", title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("decoder", no_wrap=True)
    for column in ("tokens/s", "speedup"):
        table.add_column(column, justify="right")
    for result in results:
        for row in result.rows:
            decoder = row.row if row.sparsity == 0 else f"{row.row} {row.sparsity:.0%}"
            table.add_row(row.shape, decoder, f"{row.tokens_per_second:.1f}", f"{row.speedup:.2f}x")
        table.add_section()
    return table
