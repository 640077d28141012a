"""Decoding with whole models on a GPU, row beside row: compiled PyTorch, TEAL's kernel in it, and the engine."""

from __future__ import annotations

from typing import Any

import torch

from larosa.benchmarks.checkpoints import is_converted, load_alike
from larosa.benchmarks.decode import DENSE, DENSE_LOW_BIT, check_batches, larosa_row
from larosa.benchmarks.gpu_rows import GEMLITE, TINYGEMM, GpuDecodeBenchmark, GpuDecodeRow, Rows
from larosa.benchmarks.int4_kernel import GEMLITE_GROUP, GROUP, gemlite_products, has_gemlite, int4_products
from larosa.benchmarks.results import check_counts
from larosa.benchmarks.shapes import (
    DEFAULT_LAYOUT,
    Layout,
    random_dense_model,
    random_model,
    ranks_name,
    shape_config,
    shape_name,
    sparse_models,
)
from larosa.benchmarks.sizes import SMALLER_SHAPE, check_room, rank_bytes, weight_bytes
from larosa.config import Selection, check_sparsity
from larosa.formats import CacheDtype, WeightFormat
from larosa.parallel import Ranks, whole_config


def measure_gpu_shape(
    shape: str,
    *,
    device: torch.device,
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75),
    teal_sparsities: tuple[float, ...] = (0.5,),
    dtype: torch.dtype = torch.float16,
    layers: int | None = None,
    vocab_size: int | None = None,
    layout: Layout = DEFAULT_LAYOUT,
    selection: Selection = Selection.TOP_K,
    prompt_tokens: int = 128,
    tokens: int = 256,
    compiled: bool = True,
    dense: bool = True,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    batches: tuple[int, ...] = (1,),
    ranks: Ranks | None = None,
) -> GpuDecodeBenchmark:
    """Measure a shape with random weights, LaRoSA with adapters and scores.

    Args:
        shape: one of `larosa.benchmarks.shapes.SHAPES`.
        device: a GPU.
        sparsities: of LaRoSA's rows.
        teal_sparsities: of the rows with TEAL's kernel, which take a minute or two to compile each.
        dtype: of the weights.
        layers: a cut of so many layers; None for all.
        vocab_size: another vocabulary than the shape's; None for its own.
        layout: where LaRoSA's adapters are, and how they and all else are stored. With few bits there is a dense row of
            such weights too, and with int4 compiled PyTorch with its int4 kernel.
        selection: whether LaRoSA counts, or compares with thresholds of random tokens, that keep as much on average.
        prompt_tokens: positions before the first measured token.
        tokens: measured for each row.
        compiled: without it, the rows of compiled PyTorch are left out, and speedups are over the engine dense.
        dense: without it, the model in full is never made, and speedups are over the engine dense in few bits; compiled
            PyTorch, which has it too, is left out. For a layout with few bits.
        kv_cache_dtype: how the engine keeps keys and values.
        batches: how many texts the engine continues at once, a row each.
        ranks: that run the model, of which this process is one; None where it is alone. Compiled PyTorch is alone.

    Raises:
        LarosaError: unknown shape, bad option, or too little memory.
    """
    return measure_gpu_config(
        shape_name(shape, layers, layout, ranks),
        shape_config(shape, layers=layers, vocab_size=vocab_size),
        sparsities,
        device=device,
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        layout=layout,
        selection=selection,
        teal_sparsities=teal_sparsities,
        compiled=compiled,
        dense=dense,
        kv_cache_dtype=kv_cache_dtype,
        batches=batches,
        ranks=ranks,
    )


def measure_gpu_config(
    name: str,
    config: Any,
    sparsities: tuple[float, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    prompt_tokens: int,
    tokens: int,
    layout: Layout = DEFAULT_LAYOUT,
    selection: Selection = Selection.TOP_K,
    teal_sparsities: tuple[float, ...] = (),
    compiled: bool = True,
    dense: bool = True,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    batches: tuple[int, ...] = (1,),
    ranks: Ranks | None = None,
) -> GpuDecodeBenchmark:
    """The same for any configuration, which rows call `name`."""
    for sparsity in (*sparsities, *teal_sparsities):
        check_sparsity(sparsity)
    check_counts(prompt_tokens, tokens)
    check_batches(batches)
    compiled = compiled and dense and ranks is None
    teal_sparsities = teal_sparsities if compiled else ()
    rows = Rows(name, config, device, dtype, prompt_tokens, tokens, kv_cache_dtype, batches, ranks)
    form = layout.quantization
    low_bit = form is not None
    assert dense or low_bit, "speedups are over one of them"
    int4 = compiled and form is not None and form.weights is WeightFormat.INT4
    gemlite = int4 and has_gemlite()
    # The models of all sparsities share the weights of the dense one that is stored alike.
    held = [weight_bytes(config, dtype, layout if low_bit or sparsities else None)]
    held += [weight_bytes(config, dtype)] if dense and low_bit else []
    decoders, engines = compiled + int4 + gemlite + len(teal_sparsities), dense + low_bit + len(sparsities)
    weights = sum(rank_bytes(config, whole, dtype, ranks) for whole in held)
    mend = f"{SMALLER_SHAPE}, or --no-dense" if dense and low_bit else SMALLER_SHAPE
    check_room(rows.bytes_needed(decoders, engines) + weights, device, mend)
    with torch.cuda.device(device):  # streams and events are the current device's
        if compiled:
            rows.add_compiled()
        for sparsity in teal_sparsities:
            rows.add_teal(sparsity)
        if int4:
            rows.add_int4(TINYGEMM, int4_products, GROUP)
        if gemlite:
            rows.add_int4(GEMLITE, gemlite_products, GEMLITE_GROUP)
        if dense:
            alike = random_model(config, dtype, device, ranks=ranks)
            rows.add_engines(DENSE, alike, rows.engines(alike))
        if low_bit:
            alike = random_dense_model(config, dtype, device, layout, ranks)
            rows.add_engines(DENSE_LOW_BIT, alike, rows.engines(alike))
        for _, model in sparse_models(config, dtype, device, sparsities, layout, selection, ranks, alike):
            rows.add_engines(larosa_row(selection), model, rows.engines(model))
        return rows.measure()


def measure_gpu_checkpoints(
    checkpoints: list[str],
    *,
    device: torch.device,
    dtype: str = "auto",
    prompt_tokens: int = 128,
    tokens: int = 256,
    compiled: bool = True,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    batches: tuple[int, ...] = (1,),
    ranks: Ranks | None = None,
) -> GpuDecodeBenchmark:
    """Measure checkpoints of one shape, at most one of them dense, beside compiled PyTorch with that shape.

    Args:
        checkpoints: folders or hub names.
        device: a GPU.
        dtype: number format to load them in; `auto` is their own.
        prompt_tokens: random tokens before the first measured one.
        tokens: measured for each row.
        compiled: without it, the row of compiled PyTorch is left out, and speedups are over the first checkpoint.
        kv_cache_dtype: how the engine keeps keys and values.
        batches: how many texts the engine continues at once, a row each.
        ranks: that run the models, of which this process is one; None where it is alone. Compiled PyTorch is alone.

    Raises:
        LarosaError: a checkpoint that cannot be loaded or run, several that are dense, different shapes or number
            formats, or too little memory.
    """
    check_counts(prompt_tokens, tokens)
    check_batches(batches)
    compiled = compiled and ranks is None
    models = load_alike(checkpoints, dtype, device, needs_dense=False, ranks=ranks)
    name, first = models[0]
    name += ranks_name(ranks)
    rows = Rows(name, whole_config(first), device, first.dtype, prompt_tokens, tokens, kv_cache_dtype, batches, ranks)
    check_room(rows.bytes_needed(int(compiled), len(models)), device, "give fewer checkpoints, or fewer --tokens")
    # Before minutes go into compiling the baseline: what the engine refuses, it refuses here.
    engines = [rows.engines(model) for _, model in models]
    with torch.cuda.device(device):
        if compiled:
            rows.add_compiled()
        for (path, model), of_model in zip(models, engines, strict=True):
            rows.add_engines(path if is_converted(model.config) else DENSE, model, of_model)
        return rows.measure()


def measure_compiled(
    config: Any, *, device: torch.device, dtype: torch.dtype, prompt_tokens: int, tokens: int
) -> GpuDecodeRow:
    """Measure the row of compiled PyTorch alone, for a model of a configuration.

    Raises:
        LarosaError: too little memory.
    """
    rows = Rows("", config, device, dtype, prompt_tokens, tokens)
    check_room(rows.bytes_needed(1, 0), device)
    with torch.cuda.device(device):
        rows.add_compiled()
        return rows.measure().rows[0]
