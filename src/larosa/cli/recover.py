"""`larosa recover`: train a converted model towards the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from larosa.cli import options
from larosa.cli.options import console
from larosa.evaluation.verdict import verdict
from larosa.training.recovery import RecoveryReport, RecoverySettings, recover_checkpoint
from larosa.utils.options import takes


@takes(RecoverySettings, for_typer=True)
def recover(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face name of a converted model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the trained model.")],
    reference: Annotated[str, typer.Option(metavar="DENSE", help="The dense model that it was converted from.")],
    *,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file to write.")] = "5GB",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
    **settings: Any,
) -> None:
    """Win back quality by training through the selections; an interrupted run goes on with the same command."""
    options.check_json_file(json)
    report = recover_checkpoint(
        model,
        output,
        reference=reference,
        settings=RecoverySettings(**settings),
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
