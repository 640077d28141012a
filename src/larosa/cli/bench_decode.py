"""`larosa bench decode`: tokens per second of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from larosa.benchmarks.decode import DecodeBenchmark, measure_checkpoints, measure_shape
from larosa.benchmarks.gpu_decode import measure_gpu_checkpoints, measure_gpu_shape
from larosa.benchmarks.lossless import measure_lossless
from larosa.benchmarks.shapes import DEFAULT_LAYOUT, Layout, random_quantization
from larosa.checkpoints.io import find_device, load
from larosa.cli import bench_gpu, bench_lossless, options
from larosa.cli.options import console
from larosa.cli.together import check_alone, ranks_of
from larosa.config import Score, Selection, check_planes
from larosa.decoding import CacheDtype
from larosa.decoding.lossless import DRAFT_ALONE
from larosa.errors import LarosaError
from larosa.formats import AdapterFormat, WeightFormat


def decode(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(help="A dense model and converted ones, folders or Hugging Face names.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead: a known shape with random weights, such as llama-3.2-1b.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Sparsities of --shape, separated by commas; 0.25,0.5 by default.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Only so many layers of --shape.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Another vocabulary than that of --shape.")] = None,
    layers_per_rotation: Annotated[int, typer.Option(help="Layers of --shape that share a rotation.")] = 1,
    adapters: Annotated[
        AdapterFormat | None, typer.Option(help="How --shape stores adapters; by default as convert does.")
    ] = None,
    selection: Annotated[
        Selection | None, typer.Option(help="Whether --shape keeps counts of entries (by default) or by thresholds.")
    ] = None,
    weights: Annotated[
        WeightFormat,
        typer.Option(
            help="How --shape stores linears: few bits, with convert's head for them, beside the dense model."
        ),
    ] = WeightFormat.FULL,
    weight_group: Annotated[
        int | None, typer.Option(help="Outputs that share a scale in --weights of few bits; by default as convert.")
    ] = None,
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    prompt_tokens: Annotated[int, typer.Option(help="Random tokens before the measured ones.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to measure for each row.")] = 64,
    batch: Annotated[str, typer.Option(help="Texts to continue at once, numbers separated by commas: 1,2,4,8.")] = "1",
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", help="Instead: --lossless of a model on ordinary texts, or of --shape with --acceptance."
        ),
    ] = False,
    draft: options.Draft = None,
    drafted: Annotated[
        int | None,
        typer.Option(
            help="For --lossless of a model: have so many tokens drafted each time, to see how many are right."
        ),
    ] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(
            help="For --shape --lossless: the share of drafted tokens that are right, for each --sparsity of what "
            "drafts, separated by commas: 0.9, by place 0.9/0.85, or a JSON file of bench decode MODEL --lossless."
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="On a GPU, measure compiled PyTorch too, whose compilation takes minutes.")
    ] = True,
    dense: Annotated[
        bool,
        typer.Option(
            help="On a GPU, with --weights int8 or int4: measure the model in full beside; without, it need not fit."
        ),
    ] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; PyTorch's own choice by default.")] = None,
    device: options.Device = "auto",
    top_k_over: options.TopKOver = None,
    json: options.JsonFile = None,
) -> None:
    """Time decoding: PyTorch dense, the engine dense, and the engine sparse, in turns.

    PyTorch is transformers on the CPU, and on a GPU a plain decoder compiled as a whole, once more with TEAL's kernel,
    or beside --weights int4 with PyTorch's own int4 kernel.
    """
    if (shape is None) == (not checkpoints):
        raise LarosaError("give either checkpoints or --shape")
    layout = Layout(layers_per_rotation, adapters, random_quantization(weights, weight_group))
    if shape is None and ((sparsity, layers, vocab_size, selection) != (None,) * 4 or layout != DEFAULT_LAYOUT):
        raise LarosaError(
            "--sparsity, --layers, --vocab-size, --layers-per-rotation, --adapters, --selection and --weights are for "
            "--shape: leave them out, a checkpoint has its own"
        )
    if lossless:
        check_alone("bench decode --lossless")
    if lossless and (len(checkpoints or [shape]) != 1 or batch != "1"):
        raise LarosaError("--lossless measures one text at a time of one model: give one, and no --batch")
    if lossless and layout != DEFAULT_LAYOUT:
        raise LarosaError(
            "--lossless: --draft says how the drafter of --shape stores its weights, and it has no adapters: leave "
            "--layers-per-rotation, --adapters and --weights out"
        )
    if drafted is not None and (not lossless or shape is not None):
        raise LarosaError("--drafted is for --lossless of a model: leave it out, --shape finds the best number")
    if (acceptance is not None) != (lossless and shape is not None):
        raise LarosaError("--acceptance is what --shape --lossless needs, whose random weights guess nothing")
    if draft is not None and not lossless:
        raise LarosaError(DRAFT_ALONE)
    if not dense and layout.quantization is None:
        raise LarosaError("--no-dense is for --shape with --weights int8 or int4: leave it out")
    ranks = ranks_of(device, top_k_over)
    where = find_device(device) if ranks is None else ranks.device
    batches = options.numbers("--batch", batch, int, "numbers of texts separated by commas, 1,2,4,8")
    options.check_json_file(json)
    if threads is not None:
        torch.set_num_threads(threads)
    if lossless and shape is None:
        (path,) = checkpoints or []
        drafter = options.drafter(draft, lossless, dtype, device, False)
        model, tokenizer = load(path, dtype=dtype, device=device)
        called = "what it skips, and the text" if draft is None else draft
        named = {"draft": drafter, "draft_name": called, "tokens": tokens, "kv_cache_dtype": kv_cache_dtype}
        bench_lossless.show(measure_lossless(model, tokenizer, compiled=compiled, drafted=drafted, **named), path, json)
        return
    settings: dict[str, Any] = {"prompt_tokens": prompt_tokens, "tokens": tokens, "kv_cache_dtype": kv_cache_dtype}
    if lossless and shape is not None and acceptance is not None:
        settings |= {"draft": draft, "layers": layers, "vocab_size": vocab_size, "compiled": compiled}
        settings["dtype"] = torch.bfloat16 if dtype is options.Dtype.AUTO else getattr(torch, dtype)
        settings["selection"] = selection or Selection.THRESHOLD
        bench_lossless.shape(shape, acceptance, sparsity or "0", json, device=where, **settings)
        return
    settings |= {"ranks": ranks, "batches": batches}
    if shape is None:
        settings["dtype"] = dtype
        if where.type == "cuda":
            settings["compiled"] = compiled
            bench_gpu.show_decode(measure_gpu_checkpoints(checkpoints or [], device=where, **settings), json)
        else:
            _show(measure_checkpoints(checkpoints or [], **settings), json)
        return
    fractions = options.fractions("0.25,0.5" if sparsity is None else sparsity)
    settings |= {"sparsities": fractions, "layers": layers, "vocab_size": vocab_size, "layout": layout}
    settings["selection"] = selection or (Selection.TOP_K if layout.planes == 1 else Selection.THRESHOLD)
    check_planes(layout.quantization, settings["selection"], Score.WEIGHTS)
    usual = torch.float16 if where.type == "cuda" else torch.bfloat16
    settings["dtype"] = usual if dtype is options.Dtype.AUTO else getattr(torch, dtype)
    if where.type == "cuda":
        settings |= {"compiled": compiled, "dense": dense}
        if layout.quantization is not None:  # compiling TEAL's kernel takes minutes, and it has 16 bits
            settings["teal_sparsities"] = ()
        bench_gpu.show_decode(measure_gpu_shape(shape, device=where, **settings), json)
    elif dense:
        _show(measure_shape(shape, **settings), json)
    else:
        raise LarosaError("--no-dense is for a GPU: on the CPU speedups are over the model in full")


def _show(result: DecodeBenchmark, json: Path | None) -> None:
    console.print(options.machine_line(result.machine, result.bandwidth))
    console.print(_table(result))
    options.write_json(json, result.to_dict())


def _table(result: DecodeBenchmark) -> Table:
    first = result.rows[0]
    several = any(row.batch > 1 for row in result.rows)
    table = Table(
        title=f"{options.decode_title(result.rows[-1])}, after {first.prompt_tokens} tokens; "
        f"speedups over the engine dense{', of all texts together' if several else ''}",
        title_justify="left",
    )
    table.add_column("row", no_wrap=True)
    # What several texts read together is not known, so that they have no floor.
    own = ("texts", "of all", "tokens/s", "ms (p95)") if several else ("tokens/s", "ms (p95)", "floor (share)")
    for column in (*own, "speedup"):
        table.add_column(column, justify="right")
    for row in result.rows:
        speed, times = f"{row.tokens_per_second:.1f}", f"{row.ms_per_token:.2f} ({row.ms_per_token_p95:.2f})"
        table.add_row(
            row.row if row.sparsity == 0 else f"{row.row} {row.sparsity:.0%}",
            *((str(row.batch), f"{row.total_tokens_per_second:.1f}") if several else ()),
            speed,
            times,
            *(() if several else (f"{row.floor_ms:.2f} ({row.floor_fraction:.0%})",)),
            f"{row.speedup:.2f}x",
        )
    return table
