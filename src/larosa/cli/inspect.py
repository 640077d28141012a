"""`larosa inspect`: what a model keeps, skips and costs."""

from __future__ import annotations

from rich.table import Table

from larosa.checkpoints.inspection import inspect as inspect_model
from larosa.cli import options
from larosa.cli.options import console
from larosa.sparsity.report import Inspection


def inspect(
    model: options.Model,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Show kept entries, bytes and FLOPs per layer and site; reads the configuration only."""
    options.check_json_file(json)
    report = inspect_model(model, trust_remote_code=trust_remote_code)
    _print(model, report)
    options.write_json(json, {"model": model, **report.to_dict()})


def _print(model: str, report: Inspection) -> None:
    table = Table(title=f"{model} ({report.model_type}), bytes of weights read per token", title_justify="left")
    for column in ("layer", "site", _kept_by(report), "of", "sparsity", "bytes dense", "bytes sparse"):
        table.add_column(column, justify="right")
    for row in report.sites:
        table.add_row(
            str(row.layer),
            row.site,
            f"> {row.threshold:.4g}" if row.k is None else str(row.k),
            str(row.width),
            f"{row.sparsity:.1%}",
            f"{row.bytes_dense:,}",
            f"{row.bytes_sparse:,}",
            end_section=row.site == report.sites[-1].site,
        )
    console.print(table)
    totals = Table(show_header=False)
    options.add_sparsity(totals, report.sparsity)
    totals.add_row("bytes per token, dense", f"{report.bytes_dense_total:,}")
    totals.add_row("bytes per token, sparse", f"{report.bytes_sparse_total:,}")
    totals.add_row("  of which adapters", f"{report.adapter_bytes:,}")
    totals.add_row("  of which score vectors", f"{report.score_bytes:,}")
    totals.add_row("bytes of the head, in neither", f"{report.head_bytes:,}")
    if report.head_bytes_sparse != report.head_bytes:
        totals.add_row("  of which a token reads", f"{report.head_bytes_sparse:,}")
    totals.add_row("bytes of all parameters", f"{report.parameter_bytes:,}")
    totals.add_row("bits of a weight, scales included", f"{report.weight_bits:.3g}")
    for name, flops in (
        ("FLOPs per token, dense", report.flops_dense),
        ("FLOPs per token, with adapters", report.flops_converted),
        ("FLOPs per token, skipped ones left out", report.flops_sparse),
    ):
        totals.add_row(name, f"{flops:,} ({flops / report.flops_dense:.2f}x)")
    console.print(totals)


def _kept_by(report: Inspection) -> str:
    return "threshold" if any(row.k is None for row in report.sites) else "k"
