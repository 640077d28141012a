"""`larosa recover`: train a converted model towards the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from larosa.cli import options
from larosa.cli.options import console
from larosa.evaluation.verdict import verdict
from larosa.training.recovery import RecoveryReport, RecoverySettings, recover_checkpoint

_DEFAULTS = RecoverySettings()


def recover(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face name of a converted model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the trained model.")],
    reference: Annotated[str, typer.Option(metavar="DENSE", help="The dense model that it was converted from.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="self (sampled from the dense model), wikitext2, alpaca, c4, or a .txt/.json/.jsonl file or folder.",
        ),
    ] = _DEFAULTS.data,
    num_sequences: Annotated[int, typer.Option(help="Sequences to train on.")] = _DEFAULTS.num_sequences,
    sequence_length: options.SequenceLength = _DEFAULTS.sequence_length,
    steps: Annotated[int, typer.Option(help="Steps at most.")] = _DEFAULTS.steps,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = _DEFAULTS.batch,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = _DEFAULTS.learning_rate,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between looks at held-out text, which end training when it no longer gains.")
    ] = _DEFAULTS.evaluate_every,
    seed: options.Seed = _DEFAULTS.seed,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file to write.")] = "5GB",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Win back quality by training through the selections; an interrupted run goes on with the same command."""
    options.check_json_file(json)
    report = recover_checkpoint(
        model,
        output,
        reference=reference,
        settings=RecoverySettings(
            data, num_sequences, sequence_length, steps, batch, learning_rate, evaluate_every, seed
        ),
        device=device,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
    )
    _print(report)
    options.write_json(json, report.to_dict())


def _print(report: RecoveryReport) -> None:
    table = Table(title=report.output, title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column)
    before, after = report.before, report.after
    table.add_row("held-out KL divergence to dense", f"{report.held_out_before:.4f}", f"{report.held_out_after:.4f}")
    table.add_row("KL divergence to dense, bundled text", f"{before.kl_divergence:.4f}", f"{after.kl_divergence:.4f}")
    table.add_row("top-1 agreement with dense", f"{before.top1_agreement:.1%}", f"{after.top1_agreement:.1%}")
    table.add_row("perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}")
    console.print(table)
    peaks = ", ".join(f"{peak / 2**30:.2f} GiB on {device}" for device, peak in report.peak_memory_bytes.items())
    console.print(f"Best at step {report.steps}; {report.seconds:.0f} s, peak memory {peaks}.")
    assert after.kl_divergence is not None, "there is a reference"
    console.print(verdict(after.kl_divergence))
