"""`larosa convert`: from a dense checkpoint to a sparsified one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from larosa.cli import options
from larosa.cli.options import console
from larosa.cli.sweep import SWEEP, SWEEP_PICTURE, plot_sweep, print_sweep
from larosa.config import check_sparsity
from larosa.conversion import ConversionOptions
from larosa.conversion.checkpoint import AUTO_WEIGHTS, ConversionReport, convert_at, convert_checkpoint
from larosa.conversion.checkpoint import sweep as sweep_checkpoint
from larosa.conversion.within import Trial
from larosa.errors import LarosaError
from larosa.evaluation.verdict import verdict
from larosa.formats import WeightFormat
from larosa.utils.options import takes


class Weights(StrEnum):
    """The formats of weights, and the choice between them."""

    FULL = WeightFormat.FULL
    INT8 = WeightFormat.INT8
    INT4_4 = WeightFormat.INT4_4
    INT6 = WeightFormat.INT6
    INT5 = WeightFormat.INT5
    INT4 = WeightFormat.INT4
    AUTO = AUTO_WEIGHTS


@takes(ConversionOptions, but=("sparsity", "alphas", "weights"), for_typer=True)
def convert(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file or Hugging Face name of a dense model.")],
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="New folder for the converted model; not with --sweep.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="P[,P...]",
            help="Fraction of weights to skip per token, in [0, 1), default 0.5; several give OUT-P each.",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Instead: the highest sparsity whose divergence from the dense model is not above this; with "
            "--weights auto the bits too."
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Show what each sparsity loses, as a table and sweep.png; write no model.")
    ] = False,
    *,
    search_log: Annotated[
        Path | None, typer.Option(help="Where the search keeps its points to resume from; default OUT.search.jsonl.")
    ] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="Store the decoder's linears in the model's dtype, or in few bits; auto: what reads the fewest "
            "bytes within --max-kl."
        ),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Compare with the dense model on the bundled text.")] = True,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file to write.")] = "5GB",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the model on the CPU and move layer by layer to the device.")
    ] = False,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Keep the layers on disk: memory for one of them is enough.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
    **conversion: Any,
) -> None:
    """Sparsify a model: calibrate, rotate, merge, save. The source is not touched."""
    options.check_json_file(json)
    sparsities = _sparsities(sparsity, max_kl, sweep, output)
    shared: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "offload": offload,
        "streaming": streaming,
        "trust_remote_code": trust_remote_code,
        "weights": weights,
        **conversion,
    }
    if sweep:
        points = sweep_checkpoint(model, sparsities, **shared)
        print_sweep(model, points)
        plot_sweep(model, points, SWEEP_PICTURE)
        console.print(f"Picture: {SWEEP_PICTURE}")
        options.write_json(json, {"model": model, "points": [point.to_dict() for point in points]})
        return
    assert output is not None, "checked"
    writing: dict[str, Any] = {"measure": measure, "max_shard_size": max_shard_size, **shared}
    if len(sparsities) == 1:
        (only,) = sparsities
        report = convert_checkpoint(model, output, sparsity=only, max_kl=max_kl, search_log=search_log, **writing)
        _print(report)
        options.write_json(json, report.to_dict())
        return
    if search_log is not None:
        raise LarosaError("--search-log is of one sparsity: give one, or leave it out")
    folders = {each: output.with_name(f"{output.name}-{each:g}") for each in sparsities}
    reports = []
    for report in convert_at(model, folders, **writing):
        _print(report)
        reports.append(report.to_dict())
    options.write_json(json, {"model": model, "reports": reports})


def _sparsities(sparsity: str | None, max_kl: float | None, sweep: bool, output: Path | None) -> tuple[float, ...]:
    """The sparsities asked for.

    Raises:
        LarosaError: options that exclude each other, or no number.
    """
    if output is None and not sweep:
        raise LarosaError("no OUT: name a new folder for the converted model, or give --sweep to write none")
    if sweep and (output is not None or max_kl is not None):
        raise LarosaError("--sweep writes no model: leave OUT and --max-kl out")
    if max_kl is not None and sparsity is not None:
        raise LarosaError("give either --sparsity or --max-kl, not both")
    if sparsity is None:
        return SWEEP if sweep else (ConversionOptions.sparsity,)
    found = options.numbers("--sparsity", sparsity, float, "a fraction such as 0.5, or several: 0.25,0.4,0.5")
    if not found or len(set(found)) < len(found):
        raise LarosaError(f"--sparsity '{sparsity}': give one number or several different ones")
    return tuple(check_sparsity(each) for each in found)


def _print_tried(tried: list[Trial]) -> None:
    table = Table(title="tried", title_justify="left")
    for column in ("weights", "sparsity", "KL to dense", "top-1", "MB per token, with head"):
        table.add_column(column, justify="right")
    for trial in tried:
        table.add_row(
            trial.weights,
            f"{trial.sparsity:.0%}",
            f"{trial.kl_divergence:.4f}",
            f"{trial.top1_agreement:.1%}",
            f"{trial.bytes_per_token / 1e6:.1f}",
        )
    console.print(table)


def _print(report: ConversionReport) -> None:
    if report.tried:
        _print_tried(report.tried)
    table = Table(title=f"{report.output}", title_justify="left", show_header=False)
    options.add_sparsity(table, report.sparsity)
    if report.dense is not None and report.sparse is not None:
        table.add_row("perplexity, dense", f"{report.dense.perplexity:.3f}")
        table.add_row("perplexity, sparse", f"{report.sparse.perplexity:.3f}")
        table.add_row("KL divergence to dense", f"{report.sparse.kl_divergence:.4f} nats per token")
        table.add_row("top-1 agreement with dense", f"{report.sparse.top1_agreement:.1%}")
        if report.sparse.actual_sparsity is not None:
            table.add_row("weights skipped, as measured", f"{report.sparse.actual_sparsity:.1%}")
    read, dense = (each / 1e6 for each in (report.bytes_per_token, report.bytes_dense))
    table.add_row("MB per token, with head", f"{read:.1f} (dense {dense:.1f})")
    table.add_row("time", f"{report.seconds:.1f} s")
    for device, peak in report.peak_memory_bytes.items():
        table.add_row(f"peak memory, {device}", f"{peak / 2**30:.2f} GiB")
    console.print(table)
    if report.sparse is not None and report.sparse.kl_divergence is not None:
        console.print(verdict(report.sparse.kl_divergence))
        console.print(
            f"Measured on {report.sparse.tokens:,} tokens of the bundled text; `larosa eval` measures on yours."
        )
