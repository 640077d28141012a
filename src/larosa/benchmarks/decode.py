"""Decoding with whole models, row beside row: transformers dense, the engine dense, the engine sparse."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from larosa.benchmarks.bandwidth import ReadTest
from larosa.benchmarks.checkpoints import load_alike
from larosa.benchmarks.machine import machine
from larosa.benchmarks.results import Benchmark, DecodeRow, check_counts, per_token
from larosa.benchmarks.shapes import (
    DEFAULT_LAYOUT,
    Layout,
    random_dense_model,
    random_model,
    ranks_name,
    shape_config,
    shape_name,
    sparse_copies,
    sparse_models,
)
from larosa.benchmarks.sizes import bytes_read, check_room, rank_bytes, weight_bytes
from larosa.config import LarosaConfig, Selection, check_sparsity
from larosa.decoding import CacheDtype, Engine, ForwardEngine
from larosa.decoding.cache import cache_bytes
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.loop import StepEngine, checked
from larosa.decoding.sampling import Sampler
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError
from larosa.formats import CacheFormat
from larosa.parallel import Ranks, whole_config
from larosa.sparsity.report import sparsity_of
from larosa.utils.progress import advance

TRANSFORMERS, DENSE, LAROSA = "transformers dense", "engine dense", "LaRoSA"
#: The dense model's linears and head in few bits, without adapters.
DENSE_LOW_BIT = "engine dense, few bits"

#: Tokens of each row in each round, so many that the first of them, which is not counted, costs little.
_ROUND = 8


@dataclass(frozen=True, kw_only=True)
class CpuDecodeRow(DecodeRow):
    """One model in one engine, with so many texts at once (`batch`), each of which a step gives one token.

    `tokens_per_second` and milliseconds are a text's, `total_tokens_per_second` is of all, and speedups are of that:
    over the engine dense with the first batch size. What several texts read of the weights is that of one or more.
    """

    threads: int
    batch: int
    total_tokens_per_second: float
    speedup_over_transformers: float


DecodeBenchmark = Benchmark[CpuDecodeRow]


def larosa_row(selection: Selection) -> str:
    """What rows of a shape are called."""
    return LAROSA if selection is Selection.TOP_K else f"{LAROSA}, thresholds"


def measure_shape(
    shape: str,
    *,
    sparsities: tuple[float, ...] = (0.25, 0.5),
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
    vocab_size: int | None = None,
    layout: Layout = DEFAULT_LAYOUT,
    selection: Selection = Selection.TOP_K,
    prompt_tokens: int = 128,
    tokens: int = 64,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    batches: tuple[int, ...] = (1,),
    ranks: Ranks | None = None,
) -> DecodeBenchmark:
    """Measure a shape with random weights: dense, and LaRoSA with adapters and scores at each sparsity.

    Args:
        shape: one of `larosa.benchmarks.shapes.SHAPES`.
        sparsities: fractions of the weights to skip.
        dtype: of the weights.
        layers: a cut of so many layers; None for all.
        vocab_size: another vocabulary than the shape's; None for its own.
        layout: where LaRoSA's adapters are, and how they and all else are stored. With few bits there is a dense row
            of such weights too.
        selection: whether LaRoSA counts, or compares with thresholds of random tokens, that keep as much on average.
        prompt_tokens: random tokens before the first measured one.
        tokens: measured for each row.
        kv_cache_dtype: how the engine keeps keys and values.
        batches: how many texts the engine continues at once, a row each.
        ranks: that run the model, of which this process is one; None where it is alone.

    Raises:
        LarosaError: unknown shape, bad option, or too little memory.
    """
    return measure_config(
        shape_name(shape, layers, layout, ranks),
        shape_config(shape, layers=layers, vocab_size=vocab_size),
        sparsities,
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        layout=layout,
        selection=selection,
        kv_cache_dtype=kv_cache_dtype,
        batches=batches,
        ranks=ranks,
    )


def measure_config(
    name: str,
    config: Any,
    sparsities: tuple[float, ...],
    *,
    dtype: torch.dtype,
    prompt_tokens: int,
    tokens: int,
    layout: Layout = DEFAULT_LAYOUT,
    selection: Selection = Selection.TOP_K,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    batches: tuple[int, ...] = (1,),
    ranks: Ranks | None = None,
) -> DecodeBenchmark:
    """The same for any configuration, which rows call `name`."""
    device = torch.device("cpu")
    for sparsity in sparsities:
        check_sparsity(sparsity)
    check_counts(prompt_tokens, tokens)
    check_batches(batches)
    low_bit = layout.quantization is not None
    copies = sparse_copies(sparsities) + low_bit
    held = weight_bytes(config, dtype), *[weight_bytes(config, dtype, layout)] * copies
    check_room(sum(rank_bytes(config, whole, dtype, ranks) for whole in held), device)
    subjects = _Subjects(name, prompt_tokens, tokens, kv_cache_dtype, batches)
    subjects.add_dense(random_model(config, dtype, device, ranks=ranks))
    if low_bit:
        subjects.add(DENSE_LOW_BIT, random_dense_model(config, dtype, device, layout, ranks))
    for _, model in sparse_models(config, dtype, device, sparsities, layout, selection, ranks):
        subjects.add(larosa_row(selection), model)
    return subjects.measure()


def measure_checkpoints(
    checkpoints: list[str],
    *,
    dtype: str = "auto",
    prompt_tokens: int = 128,
    tokens: int = 64,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    batches: tuple[int, ...] = (1,),
    ranks: Ranks | None = None,
) -> DecodeBenchmark:
    """Measure a dense checkpoint and converted ones of its shape; rows are called by their names.

    Args:
        checkpoints: folders or hub names.
        dtype: number format to load them in; `auto` is each checkpoint's own.
        prompt_tokens: random tokens before the first measured one.
        tokens: measured for each row.
        kv_cache_dtype: how the engine keeps keys and values.
        batches: how many texts the engine continues at once, a row each.
        ranks: that run the models, of which this process is one; None where it is alone.

    Raises:
        LarosaError: a checkpoint that cannot be loaded or run, none or several that are dense, different shapes, or
            too little memory.
    """
    check_counts(prompt_tokens, tokens)
    check_batches(batches)
    (name, dense), *converted = load_alike(checkpoints, dtype, torch.device("cpu"), needs_dense=True, ranks=ranks)
    subjects = _Subjects(name + ranks_name(ranks), prompt_tokens, tokens, kv_cache_dtype, batches)
    subjects.add_dense(dense)
    for path, model in converted:
        subjects.add(path, model)
    return subjects.measure()


def check_batches(batches: tuple[int, ...]) -> None:
    """Refuse numbers of texts that no step can run.

    Raises:
        LarosaError: one of them, or there is none.
    """
    if not batches or not all(1 <= batch <= MAX_ROWS for batch in batches):
        given = ",".join(map(str, batches)) or "none"
        raise LarosaError(f"--batch takes numbers of texts from 1 to {MAX_ROWS}, not {given}")


class _EngineOfSeveral:
    """An engine with several texts of one length, as the others are that have one."""

    def __init__(self, engine: Engine, texts: int) -> None:
        self.device = engine.device
        self._engine, self._texts = engine, range(texts)

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after prompts [B, length]."""
        hidden = [self._engine.extend(prompt[text : text + 1], 0, text)[-1:] for text in self._texts]
        return self._engine.weights.logits(torch.cat(hidden))

    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after one more token of each [B]."""
        return self._engine.step(token, position.repeat(len(token)), self._texts)


class _Subject:
    """One row as it is measured: an engine in the middle of a text, or of several."""

    def __init__(
        self, name: str, model: Any, engine: StepEngine, cache: CacheFormat, prompt: torch.Tensor, tokens: int
    ) -> None:
        self.name = name
        self.dtype, self.kv_cache_dtype = weights_name(model), str(cache.dtype).removeprefix("torch.")
        self.sparsity = sparsity_of(whole_config(model)).nominal
        self.batch = len(prompt)
        kept = self.batch * cache_bytes(model.config, cache, prompt.shape[1] + tokens // 2)
        self.bytes = bytes_read(model) + kept
        self.seconds: list[float] = []
        self._engine = engine
        self._sampler = Sampler()
        self._logits = engine.prefill(prompt)
        self._position = torch.tensor([prompt.shape[1]])

    def run(self, tokens: int) -> None:
        """Draw and run so many tokens, and one before them that is not counted."""
        for counted in [False, *[True] * tokens]:
            start = time.perf_counter()
            token = self._sampler(self._logits)
            checked(token)
            self._logits = self._engine.step(token, self._position)
            if counted:
                self.seconds.append(time.perf_counter() - start)
            self._position += 1


def weights_name(model: Any) -> str:
    """What a model's linears are stored in: its dtype, or a format of few bits."""
    block = None if getattr(model.config, "larosa", None) is None else LarosaConfig.parse(model.config.larosa)
    if block is None or block.quantization is None or block.quantization.linear_format is None:
        return str(model.dtype).removeprefix("torch.")
    return block.quantization.weights


class _Subjects:
    """The rows of a benchmark, which take turns."""

    def __init__(
        self, shape: str, prompt_tokens: int, tokens: int, kv_cache_dtype: CacheDtype, batches: tuple[int, ...]
    ) -> None:
        self._shape = shape
        self._prompt_tokens = prompt_tokens
        self._tokens = tokens
        self._kv_cache_dtype = kv_cache_dtype
        self._batches = batches
        self._subjects: list[_Subject] = []

    def add_dense(self, model: Any) -> None:
        """Two rows of one dense model: transformers' forward, and the engine on the same weights."""
        self._add(TRANSFORMERS, model, ForwardEngine(model), CacheFormat(model.dtype), 1)
        self.add(DENSE, model)

    def add(self, name: str, model: Any) -> None:
        """A row of the engine for each batch size."""
        rounds = -(-self._tokens // _ROUND)
        weights = DecoderWeights(model)
        for batch in self._batches:
            length = self._prompt_tokens + self._tokens + rounds
            engine = Engine(weights, length, self._kv_cache_dtype, batch)
            together = engine if batch == 1 else _EngineOfSeveral(engine, batch)
            self._add(name, model, together, self._kv_cache_dtype.beside(model.dtype), batch)

    def _add(self, name: str, model: Any, engine: StepEngine, cache: CacheFormat, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(model.config.vocab_size, (batch, self._prompt_tokens), generator=generator)
        self._subjects.append(_Subject(name, model, engine, cache, prompt, self._tokens))

    def measure(self) -> DecodeBenchmark:
        """Run all rows in turns of a few tokens, so that a busy moment of the machine hits all alike."""
        reading = ReadTest()
        with advance("Decoding", total=len(self._subjects) * self._tokens) as tick:
            for first in range(0, self._tokens, _ROUND):
                reading.run()
                for subject in self._subjects:
                    count = min(_ROUND, self._tokens - first)
                    subject.run(count)
                    for _ in range(count):
                        tick()
        return DecodeBenchmark(machine(), reading.bandwidth, list(self._rows(reading.bandwidth)))

    def _rows(self, bandwidth: float) -> Iterator[CpuDecodeRow]:
        totals = [subject.batch / statistics.median(subject.seconds) for subject in self._subjects]
        transformers, dense = totals[:2]
        for subject, total in zip(self._subjects, totals, strict=True):
            yield CpuDecodeRow(
                shape=self._shape,
                dtype=subject.dtype,
                kv_cache_dtype=subject.kv_cache_dtype,
                threads=torch.get_num_threads(),
                row=subject.name,
                sparsity=subject.sparsity,
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                batch=subject.batch,
                total_tokens_per_second=total,
                speedup=total / dense,
                speedup_over_transformers=total / transformers,
                **per_token(subject.seconds, subject.bytes, bandwidth),
            )
