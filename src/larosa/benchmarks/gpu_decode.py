"""Decoding with whole models on a GPU, row beside row: compiled PyTorch, TEAL's kernel in it, and the engine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from larosa.architectures import Heads
from larosa.benchmarks.compiled_decoder import CompiledDecoder, compiled_step
from larosa.benchmarks.gpu_timing import gpu_machine, gpu_read_bandwidth
from larosa.benchmarks.results import Benchmark, DecodeRow, per_token
from larosa.benchmarks.shapes import (
    check_room,
    random_model,
    random_sparse_model,
    set_sparsity,
    shape_config,
    shape_title,
    weight_bytes,
)
from larosa.config import check_layers_per_rotation, check_sparsity
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.engine import Engine
from larosa.decoding.sampling import Sampler
from larosa.errors import LarosaError
from larosa.progress import advance
from larosa.sparsity.report import inspect_config

COMPILED, TEAL, DENSE, LAROSA = "compiled PyTorch", "TEAL's kernel in it", "engine dense", "LaRoSA"

#: Tokens of each row in each round, so many that the first of them, which is not counted, costs little.
_ROUND = 32


@dataclass(frozen=True, kw_only=True)
class GpuDecodeRow(DecodeRow):
    """One decoder at one sparsity; `speedup` is over compiled PyTorch.

    `speedup_over_teal` is over TEAL's kernel at the same sparsity; None where that was not measured.
    """

    speedup_over_teal: float | None


GpuDecodeBenchmark = Benchmark[GpuDecodeRow]


def measure_gpu_decode(
    shape: str,
    *,
    device: torch.device,
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75),
    teal_sparsities: tuple[float, ...] = (0.5,),
    dtype: torch.dtype = torch.float16,
    layers: int | None = None,
    vocab_size: int | None = None,
    layers_per_rotation: int = 1,
    prompt_tokens: int = 128,
    tokens: int = 256,
    compiled: bool = True,
) -> GpuDecodeBenchmark:
    """Measure a shape with random weights, LaRoSA with adapters and scores.

    Args:
        shape: one of `larosa.benchmarks.shapes.SHAPES`.
        device: a GPU.
        sparsities: of LaRoSA's rows.
        teal_sparsities: of the rows with TEAL's kernel, which take a minute to compile each.
        dtype: of the weights.
        layers: a cut of so many layers; None for all.
        vocab_size: another vocabulary than the shape's; None for its own.
        layers_per_rotation: LaRoSA's layers that share a basis, without an adapter between them.
        prompt_tokens: positions before the first measured token.
        tokens: measured for each row.
        compiled: without it, the rows of compiled PyTorch are left out, and speedups are over the engine dense.

    Raises:
        LarosaError: unknown shape, bad option, or too little memory.
    """
    for sparsity in (*sparsities, *teal_sparsities):
        check_sparsity(sparsity)
    check_layers_per_rotation(layers_per_rotation)
    if prompt_tokens < 1 or tokens < 2:
        raise LarosaError("--prompt-tokens must be at least 1 and --tokens at least 2")
    config = shape_config(shape, layers=layers, vocab_size=vocab_size)
    config.dtype = dtype
    decoders = 1 + len(teal_sparsities) if compiled else 0
    kinds = [False] * (1 + decoders) + [True] * (any(sparsities) + (0.0 in sparsities))
    shared = {"layers_per_rotation": layers_per_rotation}
    check_room(round(1.1 * sum(weight_bytes(config, dtype, sparse=kind, **shared) for kind in kinds)), device)
    title = shape_title(shape, layers, layers_per_rotation)
    rows = _Rows(title, config, device, dtype, prompt_tokens, tokens)
    if compiled:
        rows.add_compiled()
        for sparsity in teal_sparsities:
            rows.add_teal(sparsity)
    rows.add_engine(DENSE, random_model(config, dtype, device), 0.0)
    if 0.0 in sparsities:  # an engine that keeps everything lays its weights out by rows: not those of the others
        rows.add_engine(LAROSA, random_sparse_model(config, dtype, device, **shared), 0.0)
    sparse = random_sparse_model(config, dtype, device, **shared) if any(sparsities) else None
    for sparsity in sparsities:
        if sparsity > 0:
            set_sparsity(sparse, sparsity)
            rows.add_engine(LAROSA, sparse, sparsity)
    return rows.measure()


@dataclass
class _Row:
    """One row as it is measured: `advance` runs one token, without waiting for it."""

    name: str
    sparsity: float
    bytes: int
    advance: Callable[[], object]
    seconds: list[float]

    def run(self, tokens: int) -> None:
        """Run so many tokens, and one before them that is not counted."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(tokens + 1)]
        self.advance()
        for i, event in enumerate(events):
            event.record()
            if i < tokens:
                self.advance()
        torch.cuda.synchronize()
        self.seconds += [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


class _Rows:
    """The rows of a benchmark, which take turns."""

    def __init__(
        self, shape: str, config: Any, device: torch.device, dtype: torch.dtype, prompt_tokens: int, tokens: int
    ) -> None:
        self._shape, self._config, self._device, self._dtype = shape, config, device, dtype
        self._prompt_tokens, self._tokens = prompt_tokens, tokens
        rounds = -(-tokens // _ROUND)
        self._length = prompt_tokens + tokens + rounds + 2
        self._rows: list[_Row] = []

    def add_compiled(self) -> None:
        """The decoder of plain PyTorch."""
        decoder = CompiledDecoder(self._config, self._length, self._dtype, self._device)
        self._add_decoder(COMPILED, decoder, 0.0)

    def add_teal(self, sparsity: float) -> None:
        """The same decoder with TEAL's kernel for its four products."""
        from larosa.benchmarks import teal_kernel

        heads, hidden, intermediate = (
            Heads.of(self._config),
            self._config.hidden_size,
            self._config.intermediate_size,
        )
        queries = heads.keys * heads.group * heads.size
        shapes = [
            (queries + 2 * heads.keys * heads.size, hidden),
            (hidden, queries),
            (2 * intermediate, hidden),
            (hidden, intermediate),
        ]
        tiles = teal_kernel.fastest_tiles(shapes, self._dtype, self._device, sparsity)
        products = teal_kernel.threshold_products(tiles)
        decoder = CompiledDecoder(self._config, self._length, self._dtype, self._device, products)
        _fill_cache(decoder)
        token, position = self._first()
        teal_kernel.set_thresholds(decoder, sparsity, token, position)
        self._add_decoder(TEAL, decoder, sparsity)

    def _add_decoder(self, name: str, decoder: CompiledDecoder, sparsity: float) -> None:
        _fill_cache(decoder)
        step = compiled_step(decoder)
        token, position = self._first()

        @torch.no_grad()
        def run() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            token.copy_(step(token, position))
            position.add_(1)

        for _ in range(3):  # compiles, warms up and captures
            run()
        position.fill_(self._prompt_tokens)
        dense = inspect_config(self._config)
        skipped = round(sparsity * dense.bytes_dense_total)
        self._add(name, sparsity, dense.bytes_dense_total - skipped + dense.head_bytes, run)

    def add_engine(self, name: str, model: Any, sparsity: float) -> None:
        """The engine, from a prompt of random tokens on."""
        loop = GraphLoop(Engine(model, self._length), Sampler(device=self._device))
        generator = torch.Generator().manual_seed(0)
        loop.start(torch.randint(model.config.vocab_size, (1, self._prompt_tokens), generator=generator))
        report = inspect_config(model.config)
        self._add(name, sparsity, report.bytes_sparse_total + report.head_bytes, loop.advance)

    def _add(self, name: str, sparsity: float, weights: int, run: Callable[[], object]) -> None:
        heads = Heads.of(self._config)
        position = self._prompt_tokens + self._tokens // 2
        cache = 2 * self._config.num_hidden_layers * heads.keys * heads.size * position * self._dtype.itemsize
        self._rows.append(_Row(name, sparsity, weights + cache, run, []))

    def _first(self) -> tuple[torch.Tensor, torch.Tensor]:
        token = torch.ones(1, dtype=torch.int64, device=self._device)
        return token, torch.full_like(token, self._prompt_tokens)

    def measure(self) -> GpuDecodeBenchmark:
        """Run all rows in turns of some tokens."""
        bandwidth = gpu_read_bandwidth(self._device)
        with advance("Decoding", total=math.ceil(self._tokens / _ROUND) * len(self._rows)) as tick:
            for first in range(0, self._tokens, _ROUND):
                for row in self._rows:
                    row.run(min(_ROUND, self._tokens - first))
                    tick()
        return GpuDecodeBenchmark(gpu_machine(self._device), bandwidth, list(self._results(bandwidth)))

    def _results(self, bandwidth: float) -> Iterator[GpuDecodeRow]:
        medians = {(row.name, row.sparsity): statistics.median(row.seconds) for row in self._rows}
        base = medians.get((COMPILED, 0.0), medians[DENSE, 0.0])
        for row in self._rows:
            median = medians[row.name, row.sparsity]
            teal = medians.get((TEAL, row.sparsity))
            yield GpuDecodeRow(
                shape=self._shape,
                dtype=str(self._dtype).removeprefix("torch."),
                row=row.name,
                sparsity=row.sparsity,
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                speedup=base / median,
                speedup_over_teal=None if teal is None else teal / median,
                **per_token(row.seconds, row.bytes, bandwidth),
            )


def _fill_cache(decoder: CompiledDecoder) -> None:
    """With noise, for zeros can be faster than what is there in earnest."""
    for name, buffer in decoder.named_buffers():
        if name.endswith((".keys", ".values")):
            buffer.normal_()
