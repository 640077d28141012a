"""The table of `larosa bench decode --lossless`."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from larosa.benchmarks.lossless import LosslessRow
from larosa.benchmarks.results import Benchmark
from larosa.cli import options
from larosa.cli.options import console


def show(result: Benchmark[LosslessRow], model: str, json: Path | None) -> None:
    """Print the rows, and write them where `--json` says."""
    console.print(options.machine_line(result.machine, result.bandwidth))
    table = Table(title=f"{model}, drafted by {result.rows[0].draft}; tokens a second", title_justify="left")
    table.add_column("texts", no_wrap=True)
    for column in ("tokens", "dense", "lossless", "speedup", "accepted", "tokens a pass"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            row.kind,
            str(row.tokens),
            f"{row.dense_tokens_per_second:.1f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
            "" if row.acceptance is None else f"{row.acceptance:.0%} of {row.drafted}",
            f"{row.tokens_per_pass:.2f}",
        )
    console.print(table)
    options.write_json(json, result.to_dict())
