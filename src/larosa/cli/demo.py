"""`larosa demo`: what rotation buys, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from larosa.cli import options
from larosa.cli.options import console
from larosa.demo import DemoRow, plot_demo, run_demo


def demo(
    output: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("demo.png"),
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.JsonFile = None,
) -> None:
    """Compare dense, Top-K and LaRoSA on the bundled model and text."""
    options.check_json_file(json)
    rows = run_demo(seed=seed, device=device)
    console.print(_table(rows))
    plot_demo(rows, output)
    console.print(f"Picture: {output}")
    options.write_json(json, {"rows": [row.to_dict() for row in rows]})


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
