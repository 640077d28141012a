"""`larosa eval`: what a model lost."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from larosa.cli import options
from larosa.cli.options import console
from larosa.cli.together import load_model
from larosa.decoding import CacheDtype
from larosa.evaluation.divergence import Comparison, Distribution, Estimate
from larosa.evaluation.perplexity import Evaluation, Protocol
from larosa.evaluation.perplexity import evaluate as evaluate_model
from larosa.evaluation.verdict import verdict

#: The percentiles that are printed, a row a group; the others are in the JSON.
_UPPER = (("50",), ("90", "95", "99", "99.9"))
_BOTH_ENDS = (("0.1", "1", "5", "25"), ("50",), ("75", "95", "99", "99.9"))


class Protocols(StrEnum):
    """What `--protocol` takes."""

    ALL = Protocol.ALL
    CONTINUATION = Protocol.CONTINUATION
    BOTH = "both"

    @property
    def each(self) -> list[Protocol]:
        """The protocols to measure by."""
        return list(Protocol) if self is Protocols.BOTH else [Protocol(self)]


def evaluate(
    model: options.Model,
    data: Annotated[
        str, typer.Option(metavar="SOURCE", help="bundled, wikitext2, c4, or a .txt/.json/.jsonl file or folder.")
    ] = "bundled",
    reference: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="The dense model, for KL divergence and all else that llama.cpp reports."),
    ] = None,
    protocol: Annotated[
        Protocols,
        typer.Option(
            help="all: every position sparse and scored; continuation: a dense prompt, what follows sparse and scored."
        ),
    ] = Protocols.ALL,
    prompt_length: Annotated[
        int | None, typer.Option(help="Tokens of the dense prompt of --protocol continuation; default: half of each.")
    ] = None,
    sequence_length: options.SequenceLength = None,
    max_sequences: Annotated[int | None, typer.Option(help="Score only the first so many sequences.")] = None,
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    top_k_over: options.TopKOver = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Measure perplexity and, with --reference, the distance from the dense model."""
    options.check_json_file(json)
    settings: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load_model(model, **settings, over=top_k_over)
    dense = None
    if reference is not None:
        dense = load_model(reference, **settings, over=top_k_over).model
    found = [
        evaluate_model(
            loaded,
            tokenizer,
            data,
            sequence_length=sequence_length,
            max_sequences=max_sequences,
            reference=dense,
            kv_cache_dtype=kv_cache_dtype,
            protocol=each,
            prompt_length=None if protocol is Protocols.BOTH and each is Protocol.ALL else prompt_length,
        )
        for each in protocol.each
    ]
    _print(model, data, kv_cache_dtype, found)
    content = {"model": model, "data": data, "kv_cache_dtype": kv_cache_dtype.value}
    each_as_dict = [result.to_dict() for result in found]
    options.write_json(json, content | ({"evaluations": each_as_dict} if len(found) > 1 else each_as_dict[0]))


def _print(model: str, data: str, kv_cache_dtype: CacheDtype, found: list[Evaluation]) -> None:
    """One column a protocol."""
    table = Table(title=f"{model} on {data}", title_justify="left", show_header=False)
    if kv_cache_dtype is not CacheDtype.AUTO:
        table.add_row("keys and values", *[kv_cache_dtype.value] * len(found))
    for rows in zip(*map(_rows, found), strict=True):
        table.add_row(rows[0][0], *(value for _, value in rows))
    options.print_whole(table)
    console.print("Errors (±) are standard errors over tokens, taken as independent.")
    for result in found:
        if result.kl_divergence is not None:
            protocol = f"{result.protocol}: " if len(found) > 1 else ""
            console.print(f"{protocol}{verdict(result.kl_divergence)}", soft_wrap=True)


def _rows(result: Evaluation) -> list[tuple[str, str]]:
    """The numbers of a measurement, each under its name."""
    prompt = f", dense prompt of {result.prompt_length:,} tokens" if result.prompt_length else ""
    rows = [
        ("protocol", f"{result.protocol}{prompt}"),
        ("perplexity", f"{Estimate(result.perplexity, result.perplexity_stderr):.4f}"),
    ]
    if result.comparison is not None:
        rows += _compared(result.comparison)
    rows.append(("tokens", f"{result.tokens:,} in {result.windows} windows of {result.sequence_length}"))
    rows += options.sparsity_rows(result.sparsity)
    rows += [(f"zeros at {site}", f"{zeros:.2%}") for site, zeros in (result.zeros or {}).items()]
    if result.actual_sparsity is not None:
        rows.append(("weights skipped by a token, as measured", f"{result.actual_sparsity:.2%}"))
    return rows


def _compared(found: Comparison) -> list[tuple[str, str]]:
    """What llama.cpp prints with --kl-divergence."""
    kl, change = found.kl_divergence, found.probability_change
    correlation = "none" if found.correlation is None else f"{found.correlation:.2%}"
    return [
        ("  dense", f"{found.reference_perplexity:.4f}"),
        ("  less dense", f"{found.perplexity_difference:.4f}"),
        ("  over dense", f"{found.perplexity_ratio:.4f}"),
        ("  ln of that", f"{found.log_perplexity_ratio:.5f}"),
        ("  correlation of the losses", correlation),
        ("KL divergence to dense", f"{kl.mean:.4f} nats per token"),
        *_spread(kl, _UPPER, ".4f"),
        ("change in p of the true token", f"{change.mean:.3%}"),
        ("  RMS", f"{found.probability_change_rms:.3%}"),
        *_spread(change, _BOTH_ENDS, ".2%"),
        ("top-1 agreement with dense", f"{found.same_top_token:.2%}"),
    ]


def _spread(found: Distribution, groups: Sequence[tuple[str, ...]], spec: str) -> list[tuple[str, str]]:
    """Percentiles in groups, then the extremes."""
    rows = []
    for names in groups:
        label = "median" if names == ("50",) else f"{', '.join(names)}%"
        rows.append((f"  {label}", ", ".join(format(found.percentiles[name], spec) for name in names)))
    return [*rows, ("  minimum, maximum", f"{found.min:{spec}}, {found.max:{spec}}")]
