"""The tables of `larosa bench decode --lossless`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from larosa.benchmarks.lossless import ALL, LosslessRow
from larosa.benchmarks.lossless_shape import Acceptance, ComposedRow, measure_lossless_shape
from larosa.benchmarks.results import Benchmark
from larosa.cli import options
from larosa.cli.options import console


def show(result: Benchmark[LosslessRow], model: str, json: Path | None) -> None:
    """Print the rows of a model, and write them where `--json` says."""
    console.print(options.machine_line(result.machine, result.bandwidth))
    compiled = result.rows[0].compiled_tokens_per_second
    table = Table(title=f"{model}, drafted by {result.rows[0].draft}; tokens a second", title_justify="left")
    table.add_column("texts", no_wrap=True)
    over = () if compiled is None else ("over compiled",)
    for column in ("tokens", "dense", "lossless", "speedup", *over, "accepted", "tokens a pass"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            row.kind,
            str(row.tokens),
            f"{row.dense_tokens_per_second:.1f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
            *(() if compiled is None else (f"{row.tokens_per_second / compiled:.2f}x",)),
            "" if row.acceptance is None else f"{row.acceptance:.0%} of {row.drafted}",
            f"{row.tokens_per_pass:.2f}",
        )
    options.print_whole(table)
    together = next(row for row in result.rows if row.kind == ALL)
    console.print(f"All {together.tokens + together.texts} tokens are those of the dense pass alone.")
    if together.accepted_at:
        console.print(f"The model's drafts were right by place: {_shares(together.accepted_at)}.", soft_wrap=True)
    if compiled is not None:
        console.print(f"Compiled PyTorch, with random weights of this shape: {compiled:.1f} tokens/s.")
    options.write_json(json, result.to_dict())


def shape(name: str, acceptance: str, sparsity: str, json: Path | None, **settings: Any) -> None:
    """Measure a shape, print what its times come to and write it; `settings` are of `measure_lossless_shape`."""
    acceptances = [Acceptance.read(part) for part in acceptance.split(",")]
    rounds = settings.pop("tokens")
    sparsities = options.fractions(sparsity)
    result = measure_lossless_shape(name, acceptances, sparsities=sparsities, rounds=rounds, **settings)
    console.print(options.machine_line(result.machine, result.bandwidth))
    options.print_whole(_composed(result))
    first = result.rows[0]
    times = ", ".join(f"{ms:.3f}" for ms in first.verify_ms)
    console.print(f"Measured: a dense step over 1 to {len(first.verify_ms)} rows takes {times} ms.", soft_wrap=True)
    if (compiled := first.compiled_tokens_per_second) is not None:
        console.print(f"Measured: compiled PyTorch, {compiled:.1f} tokens/s.")
    console.print(
        "Tokens/s are composed, not measured: of the times above and an acceptance measured elsewhere.", soft_wrap=True
    )
    for row in result.rows:
        console.print(
            f"  {row.draft}, {row.sparsity:.0%}: {_shares(row.accepted_at)} by place ({row.acceptance})", soft_wrap=True
        )
    options.write_json(json, result.to_dict())


def _composed(result: Benchmark[ComposedRow]) -> Table:
    first = result.rows[0]
    table = Table(
        title=f"{first.shape}, {first.dtype}, after {first.prompt_tokens} tokens; the engine dense takes "
        f"{first.dense_ms:.3f} ms a token",
        title_justify="left",
    )
    table.add_column("drafter", no_wrap=True)
    for column in ("ms a drafted token", "drafted", "tokens a pass", "tokens/s, composed", "speedup, composed"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            f"{row.draft}, {row.sparsity:.0%}",
            f"{row.draft_ms:.3f}",
            str(row.drafted),
            f"{row.tokens_per_pass:.2f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
        )
    return table


def _shares(shares: list[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)
