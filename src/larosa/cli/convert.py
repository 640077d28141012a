"""`larosa convert`: from a dense checkpoint to a sparsified one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from larosa.cli import options
from larosa.cli.options import console
from larosa.config import (
    AdapterFormat,
    Budget,
    Compensation,
    Covariance,
    Method,
    Prefill,
    Recipe,
    Rotation,
    RotationObjective,
    Score,
    Search,
)
from larosa.convert_checkpoint import ConversionReport, convert_checkpoint


def convert(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face name of a dense model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the converted model.")],
    sparsity: Annotated[float, typer.Option(help="Fraction of weights to skip per token, in [0, 1).")] = 0.5,
    method: Annotated[
        Method, typer.Option(help="larosa, or what it is compared with: topk (no rotation), teal, cats.")
    ] = Method.LAROSA,
    recipe: Annotated[Recipe, typer.Option(help="Named defaults for the options below.")] = Recipe.BEST,
    budget: Annotated[Budget | None, typer.Option(help="What the sparsity is a fraction of.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="self, wikitext2, alpaca, c4, or a .txt/.json/.jsonl file or folder."),
    ] = None,
    num_sequences: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = 0,
    rotation: Annotated[Rotation | None, typer.Option(help="Which bases to rotate into.")] = None,
    layers_per_rotation: Annotated[int, typer.Option(help="Layers that share a rotation of --rotation layer.")] = 1,
    adapters: Annotated[
        AdapterFormat | None,
        typer.Option(help="Store adapters between rotations in full, or by 8-bit numbers."),
    ] = None,
    covariance: Annotated[Covariance | None, typer.Option(help="Which site's activations the PCA is of.")] = None,
    rotation_objective: Annotated[
        RotationObjective | None, typer.Option(help="PCA of what the weights read, or also of what it does.")
    ] = None,
    value_rotation: Annotated[
        bool | None, typer.Option("--value-rotation/--no-value-rotation", help="Rotate the value heads too.")
    ] = None,
    score: Annotated[
        Score | None, typer.Option(help="Rank entries by magnitude, alone or times weight norm or Fisher information.")
    ] = None,
    search: Annotated[
        Search | None, typer.Option(help="Share out sparsity: grid, sensitivity, fisher (larosa, topk), greedy (teal).")
    ] = None,
    search_log: Annotated[
        Path | None, typer.Option(help="Where the search keeps its points to resume from; default OUT.search.jsonl.")
    ] = None,
    compensation: Annotated[
        Compensation, typer.Option(help="Refit the weights to the entries that are kept.")
    ] = Compensation.NONE,
    prefill: Annotated[Prefill, typer.Option(help="Sparsify prompts too, or run them dense.")] = Prefill.SPARSE,
    measure: Annotated[bool, typer.Option(help="Compare with the dense model on the bundled text.")] = True,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file to write.")] = "5GB",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the model on the CPU and move layer by layer to the device.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Sparsify a model: calibrate, rotate, merge, save. The source is not touched."""
    options.check_json_file(json)
    report = convert_checkpoint(
        model,
        output,
        dtype=dtype,
        device=device,
        offload=offload,
        trust_remote_code=trust_remote_code,
        measure=measure,
        max_shard_size=max_shard_size,
        search_log=search_log,
        sparsity=sparsity,
        method=method,
        recipe=recipe,
        budget=budget,
        calibration=calibration,
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        seed=seed,
        rotation=rotation,
        layers_per_rotation=layers_per_rotation,
        adapters=adapters,
        covariance=covariance,
        rotation_objective=rotation_objective,
        value_rotation=value_rotation,
        score=score,
        search=search,
        compensation=compensation,
        prefill=prefill,
    )
    _print(report)
    options.write_json(json, report.to_dict())


def _print(report: ConversionReport) -> None:
    table = Table(title=f"{report.output}", title_justify="left", show_header=False)
    options.add_sparsity(table, report.sparsity)
    if report.dense is not None and report.sparse is not None:
        table.add_row("perplexity, dense", f"{report.dense.perplexity:.3f}")
        table.add_row("perplexity, sparse", f"{report.sparse.perplexity:.3f}")
        table.add_row("KL divergence to dense", f"{report.sparse.kl_divergence:.4f} nats per token")
        table.add_row("top-1 agreement with dense", f"{report.sparse.top1_agreement:.1%}")
        if report.sparse.actual_sparsity is not None:
            table.add_row("weights skipped, as measured", f"{report.sparse.actual_sparsity:.1%}")
    table.add_row("time", f"{report.seconds:.1f} s")
    for device, peak in report.peak_memory_bytes.items():
        table.add_row(f"peak memory, {device}", f"{peak / 2**30:.2f} GiB")
    console.print(table)
    if report.sparse is not None:
        console.print(
            f"Measured on {report.sparse.tokens:,} tokens of the bundled text; `larosa eval` measures on yours."
        )
