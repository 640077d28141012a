"""`larosa eval`: what a model lost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from larosa.checkpoint import load
from larosa.cli import options
from larosa.cli.options import console
from larosa.decoding import CacheDtype
from larosa.evaluation.perplexity import Evaluation
from larosa.evaluation.perplexity import evaluate as evaluate_model


def evaluate(
    model: options.Model,
    data: Annotated[
        str, typer.Option(metavar="SOURCE", help="bundled, wikitext2, c4, or a .txt/.json/.jsonl file or folder.")
    ] = "bundled",
    reference: Annotated[
        str | None, typer.Option(metavar="DENSE", help="The dense model, for KL divergence and top-1 agreement.")
    ] = None,
    sequence_length: options.SequenceLength = None,
    max_sequences: Annotated[int | None, typer.Option(help="Score only the first so many sequences.")] = None,
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Measure perplexity and, with --reference, the distance from the dense model."""
    options.check_json_file(json)
    loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    dense = None
    if reference is not None:
        dense = load(reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code).model
    result = evaluate_model(
        loaded,
        tokenizer,
        data,
        sequence_length=sequence_length,
        max_sequences=max_sequences,
        reference=dense,
        kv_cache_dtype=kv_cache_dtype,
    )
    _print(model, data, kv_cache_dtype, result)
    options.write_json(json, {"model": model, "data": data, "kv_cache_dtype": kv_cache_dtype.value, **result.to_dict()})


def _print(model: str, data: str, kv_cache_dtype: CacheDtype, result: Evaluation) -> None:
    table = Table(title=f"{model} on {data}", title_justify="left", show_header=False)
    if kv_cache_dtype is not CacheDtype.AUTO:
        table.add_row("keys and values", kv_cache_dtype.value)
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    if result.kl_divergence is not None:
        table.add_row("KL divergence to dense", f"{result.kl_divergence:.4f} nats per token")
        table.add_row("top-1 agreement with dense", f"{result.top1_agreement:.2%}")
    table.add_row("tokens", f"{result.tokens:,} in {result.windows} windows of {result.sequence_length}")
    options.add_sparsity(table, result.sparsity)
    for site, zeros in (result.zeros or {}).items():
        table.add_row(f"zeros at {site}", f"{zeros:.2%}")
    if result.actual_sparsity is not None:
        table.add_row("weights skipped by a token, as measured", f"{result.actual_sparsity:.2%}")
    console.print(table)
