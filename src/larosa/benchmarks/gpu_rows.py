"""The rows of a benchmark of decoding on a GPU, as they are measured: in turns, some tokens of each at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch

from larosa.architectures import Heads
from larosa.benchmarks.compiled_decoder import (
    Attention,
    CompiledDecoder,
    Products,
    compilation,
    compiled_step,
    decoder_bytes,
)
from larosa.benchmarks.decode import weights_name
from larosa.benchmarks.gpu_timing import READ_BYTES, gpu_machine, gpu_read_bandwidth
from larosa.benchmarks.results import Benchmark, DecodeRow, per_token
from larosa.benchmarks.sizes import bytes_read
from larosa.decoding.cache import cache_bytes
from larosa.decoding.cuda_graph import GraphLoop, capture
from larosa.decoding.engine import Engine
from larosa.decoding.sampling import Sampler
from larosa.decoding.weights import DecoderWeights
from larosa.formats import CacheDtype, CacheFormat
from larosa.ops.cuda.launch import early_launches
from larosa.parallel import Ranks, whole_config
from larosa.sparsity.report import inspect_config, sparsity_of
from larosa.utils.progress import advance, track

COMPILED, TEAL, TINYGEMM = "compiled PyTorch", "TEAL's kernel in it", "int4 tinygemm in it"
GEMLITE = "int4 GemLite in it"

#: Tokens of each row in each round, so many that the first of them, which is not counted, costs little.
_ROUND = 32
#: Tokens by which the faster of two ways is told.
_TRIAL = 16


@dataclass(frozen=True, kw_only=True)
class GpuDecodeRow(DecodeRow):
    """One decoder at one sparsity, with so many texts at once (`batch`), each of which a step gives one token.

    `tokens_per_second` and milliseconds are a text's, `total_tokens_per_second` is of all, and speedups are of that:
    `speedup` over compiled PyTorch, which has one text, `speedup_over_teal` over TEAL's kernel at the same sparsity;
    None where that was not measured. What several texts read of sparse weights is that of one or more.
    """

    batch: int
    total_tokens_per_second: float
    speedup_over_teal: float | None


GpuDecodeBenchmark = Benchmark[GpuDecodeRow]


class _GraphLoopOfSeveral:
    """Texts behind prompts [B, length], each of which a graph's replay gives its likeliest token."""

    @torch.inference_mode()
    def __init__(self, engine: Engine, prompts: torch.Tensor) -> None:
        self._engine = engine
        hidden = [engine.extend(prompt[None], 0, text)[-1:] for text, prompt in enumerate(prompts)]
        self._tokens = torch.ops.larosa.greedy(engine.weights.logits(torch.cat(hidden)))
        self._texts = torch.arange(len(prompts), device=engine.device)
        self._positions = torch.full_like(self._texts, prompts.shape[1])
        with early_launches():
            self._graph, _ = capture(self._step, engine, before=lambda: self._positions.fill_(prompts.shape[1]))

    def advance(self) -> None:
        """Run the last token of each text and draw the next, without waiting for it."""
        self._graph.replay()

    def _step(self) -> None:
        self._tokens.copy_(torch.ops.larosa.greedy(self._engine.step(self._tokens, self._positions, self._texts)))
        self._positions.add_(1)


@dataclass
class _Row:
    """One row as it is measured: `advance` runs one token of each text, without waiting for it."""

    name: str
    sparsity: float
    dtype: str  # of the linears
    cache: CacheFormat
    bytes: int
    advance: Callable[[], object]
    seconds: list[float]
    batch: int = 1

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


class Rows:
    """The rows of a benchmark, which take turns."""

    def __init__(
        self,
        shape: str,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        prompt_tokens: int,
        tokens: int,
        kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
        batches: tuple[int, ...] = (1,),
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = 1 if ranks is None else ranks.size
        self._shape, self._device, self._dtype = shape, device, dtype
        self._config = deepcopy(config)
        self._config.dtype = dtype
        self._prompt_tokens, self._tokens = prompt_tokens, tokens
        self._kv_cache_dtype, self._batches = kv_cache_dtype, batches
        self._engine_cache = kv_cache_dtype.beside(dtype)
        #: Positions that an engine or decoder needs: each round runs a token that is not counted.
        self.length = prompt_tokens + tokens + math.ceil(tokens / _ROUND) + 2
        self._rows: list[_Row] = []
        # A decoder that an earlier benchmark compiled would count towards PyTorch's limit, and keep its memory.
        torch.compiler.reset()

    def bytes_needed(self, decoders: int, engines: int) -> int:
        """What is held at once beside the engines' models: compiled decoders, caches, and the test of the bandwidth.

        `engines` have a text each, for each of the batches as many as it has.
        """
        texts = engines * sum(self._batches)
        return (
            decoders * decoder_bytes(self._config, self.length, self._dtype)
            + texts * cache_bytes(self._config, self._engine_cache, self.length) // self._ranks
            + READ_BYTES
        )

    def engines(self, model: Any) -> list[Engine]:
        """What `add_engines` takes: for each batch one with room for all tokens, over the same weights."""
        weights = DecoderWeights(model)
        return [Engine(weights, self.length, self._kv_cache_dtype, batch) for batch in self._batches]

    def add_compiled(self) -> None:
        """The decoder of plain PyTorch."""
        decoder = CompiledDecoder(self._config, self.length, self._dtype, self._device)
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
        decoder = CompiledDecoder(self._config, self.length, self._dtype, self._device, products)
        _fill_cache(decoder)
        token, position = self._first()
        teal_kernel.set_thresholds(decoder, sparsity, token, position)
        self._add_decoder(TEAL, decoder, sparsity)

    def add_int4(self, name: str, products: Products, group: int) -> None:
        """The same decoder, in bfloat16, with another's int4 kernel for its products and its head.

        One way of attention is compiled, not two: two products take less time than PyTorch's kernel where queries share
        keys, and only what the compiler makes of its own products can outweigh that.
        """
        decoder = CompiledDecoder(self._config, self.length, torch.bfloat16, self._device, products, products)
        dense = inspect_config(self._config)
        weights = dense.bytes_dense_total + dense.head_bytes
        # Half a byte a weight, and for each group a scale and what is added.
        read = weights // self._dtype.itemsize * (group // 2 + 2 * torch.bfloat16.itemsize) // group
        self._add_compiled(name, decoder, 0.0, read, "int4", CacheFormat(torch.bfloat16), opaque=True)

    def _add_decoder(self, name: str, decoder: CompiledDecoder, sparsity: float) -> None:
        dense = inspect_config(self._config)
        skipped = round(sparsity * dense.bytes_dense_total)
        read = dense.bytes_dense_total - skipped + dense.head_bytes
        self._add_compiled(name, decoder, sparsity, read, _dtype_name(self._dtype), CacheFormat(self._dtype))

    def _add_compiled(
        self,
        name: str,
        decoder: CompiledDecoder,
        sparsity: float,
        read: int,
        dtype: str,
        cache: CacheFormat,
        opaque: bool = False,
    ) -> None:
        _fill_cache(decoder)
        ways = track(decoder.attentions[-1:] if opaque else decoder.attentions, f"Compiling: {name}")
        _, run = min((self._compiled(decoder, attention, opaque) for attention in ways), key=itemgetter(0))
        self.add(name, sparsity, dtype, cache, read, run)

    def _compiled(
        self, decoder: CompiledDecoder, attention: Attention, opaque: bool
    ) -> tuple[float, Callable[[], None]]:
        """What runs a token of a decoder that attends in a way, and seconds that it takes."""
        step = compiled_step(decoder, attention, opaque)
        token, position = self._first()

        @torch.no_grad()
        def run() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            token.copy_(step(token, position))
            position.add_(1)

        with compilation():
            for _ in range(3):  # compiles, warms up and captures
                run()
        trial = _Row("", 0.0, "", CacheFormat(self._dtype), 0, run, [])
        position.fill_(self._prompt_tokens)
        trial.run(min(_TRIAL, self._tokens))
        position.fill_(self._prompt_tokens)
        return statistics.median(trial.seconds), run

    def add_engines(self, name: str, model: Any, engines: list[Engine]) -> None:
        """The engine with each batch, from prompts of random tokens on."""
        sparsity = sparsity_of(whole_config(model)).nominal
        row = name, sparsity, weights_name(model), self._engine_cache, bytes_read(model)
        for batch, engine in zip(self._batches, engines, strict=True):
            generator = torch.Generator().manual_seed(0)
            prompts = torch.randint(model.config.vocab_size, (batch, self._prompt_tokens), generator=generator)
            if batch == 1:
                loop = GraphLoop(engine, Sampler(device=self._device, kernels=True))
                loop.start(prompts)
                self.add(*row, loop.advance)
            else:
                self.add(*row, _GraphLoopOfSeveral(engine, prompts).advance, batch)

    def add(
        self,
        name: str,
        sparsity: float,
        dtype: str,
        cache: CacheFormat,
        weights: int,
        run: Callable[[], object],
        batch: int = 1,
    ) -> None:
        """A row of what reads so many bytes of weights for a token, which `run` runs without waiting for it."""
        kept = cache_bytes(self._config, cache, self._prompt_tokens + self._tokens // 2) // self._ranks
        self._rows.append(_Row(name, sparsity, dtype, cache, weights + batch * kept, run, [], batch))

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
        return GpuDecodeBenchmark(gpu_machine(self._device), bandwidth, list(self.results(bandwidth)))

    def results(self, bandwidth: float) -> Iterator[GpuDecodeRow]:
        """What the rows' times come to; speedups are over the first."""
        medians = {(row.name, row.sparsity): statistics.median(row.seconds) for row in self._rows}
        base = statistics.median(self._rows[0].seconds)
        for row in self._rows:
            median = statistics.median(row.seconds)
            teal = medians.get((TEAL, row.sparsity))
            yield GpuDecodeRow(
                shape=self._shape,
                dtype=row.dtype,
                kv_cache_dtype=_dtype_name(row.cache.dtype),
                row=row.name,
                sparsity=row.sparsity,
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                batch=row.batch,
                total_tokens_per_second=row.batch / median,
                speedup=base * row.batch / median,
                speedup_over_teal=None if teal is None else teal * row.batch / median,
                **per_token(row.seconds, row.bytes, bandwidth),
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fill_cache(decoder: CompiledDecoder) -> None:
    """With noise, for zeros can be faster than what is there in earnest."""
    for name, buffer in decoder.named_buffers():
        if name.endswith((".keys", ".values")):
            buffer.normal_()
