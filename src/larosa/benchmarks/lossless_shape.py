"""What lossless decoding would give on a known shape: measured times of random weights, an acceptance from elsewhere.

Random weights guess nothing of each other, so that their own acceptance says nothing. What steps take is real.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch

from larosa.benchmarks.bandwidth import read_bandwidth
from larosa.benchmarks.gpu_decode import measure_compiled
from larosa.benchmarks.gpu_timing import READ_BYTES, gpu_machine, gpu_read_bandwidth
from larosa.benchmarks.lossless import ALL
from larosa.benchmarks.machine import machine
from larosa.benchmarks.results import Benchmark
from larosa.benchmarks.shapes import (
    Layout,
    random_model,
    random_quantization,
    shape_config,
    shape_name,
    sparse_copies,
    sparse_models,
)
from larosa.benchmarks.sizes import check_room, weight_bytes
from larosa.config import Selection, check_sparsity
from larosa.decoding import CacheDtype, Engine
from larosa.decoding.cache import cache_bytes
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.drafting import Last, run_ahead
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.lossless import RoundedDraft
from larosa.decoding.pace import Clock, CudaClock, HostClock
from larosa.decoding.sampling import Sampler
from larosa.decoding.steps import steps_of
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError, choose
from larosa.formats import WeightFormat
from larosa.utils.progress import advance

#: Drafted in one go for each time of a drafted token.
_BLOCK = 4
#: Tokens of the engine's own loop for each time of a dense token.
_TOKENS = 8


@dataclass(frozen=True)
class Acceptance:
    """Which share of a drafter's first tokens is right, of its second ones where the first was and so on.

    `at` holds the last number for all places behind it. `source` says where it is from.
    """

    at: tuple[float, ...]
    source: str

    @classmethod
    def read(cls, text: str) -> Acceptance:
        """Numbers by place, as 0.9/0.85, or what `bench decode MODEL --lossless --json` wrote of a model's texts.

        Raises:
            LarosaError: it is neither.
        """
        try:
            at = tuple(float(part) for part in text.split("/"))
        except ValueError:
            at = _read(Path(text))
        if not at or not all(0 <= share <= 1 for share in at):
            raise LarosaError(
                f"--acceptance {text}: give shares from 0 to 1, 0.9/0.85, or a file of bench decode --lossless"
            )
        return cls(at, text)

    def chances(self) -> list[float]:
        """That the first token is right, that the first two are and so on, up to as many as are ever drafted."""
        places = [*self.at, *[self.at[-1]] * MAX_ROWS][: MAX_ROWS - 1]
        return list(accumulate(places, mul))


def _read(path: Path) -> tuple[float, ...]:
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        (row,) = [row for row in rows if row["kind"] == ALL]
        return tuple(row.get("accepted_at") or [row["acceptance"]])
    except OSError as error:
        raise LarosaError(f"{path}: {error.strerror} (--acceptance)") from None
    except (ValueError, KeyError, TypeError):
        raise LarosaError(f"{path}: not what bench decode MODEL --lossless --json writes (--acceptance)") from None


@dataclass(frozen=True, kw_only=True)
class ComposedRow:
    """One drafter: times in milliseconds, medians as measured, and what they come to with an acceptance.

    `verify_ms` is of dense steps over one row, over two and so on, with the wait for what they give; `draft_ms` of one
    drafted token. `tokens_per_second` is composed of these and `accepted_at`, which `acceptance` names the source of,
    at the number of drafted tokens that gives most; `speedup` is over the engine dense, a token of which takes
    `dense_ms`.
    """

    shape: str
    dtype: str
    draft: str
    sparsity: float
    prompt_tokens: int
    dense_ms: float
    verify_ms: list[float]
    draft_ms: float
    acceptance: str
    accepted_at: list[float]
    drafted: int
    tokens_per_pass: float
    tokens_per_second: float
    speedup: float
    compiled_tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which says that the speeds are composed."""
        return {"composed": "measured times of random weights, and an acceptance measured elsewhere", **asdict(self)}


@dataclass(frozen=True)
class Composed:
    """What a number of drafted tokens gives: tokens of a dense pass and their seconds."""

    drafted: int
    tokens: float
    seconds: float


def best(draft: float, verify: Sequence[float], acceptance: Acceptance) -> Composed:
    """The number of drafted tokens that gives most tokens a second, none perhaps.

    Args:
        draft: seconds of one drafted token.
        verify: seconds of a dense step over one row, over two and so on.
    """
    tokens = accumulate([1.0, *acceptance.chances()])
    found = [
        Composed(count, gives, count * draft + checked)
        for count, (gives, checked) in enumerate(zip(tokens, verify, strict=True))
    ]
    return max(found, key=lambda each: each.tokens / each.seconds)


def measure_lossless_shape(
    shape: str,
    acceptances: Sequence[Acceptance],
    *,
    device: torch.device,
    sparsities: tuple[float, ...] = (0.0,),
    draft: str | None = RoundedDraft.INT4,
    selection: Selection = Selection.THRESHOLD,
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
    vocab_size: int | None = None,
    prompt_tokens: int = 128,
    rounds: int = 20,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    compiled: bool = True,
) -> Benchmark[ComposedRow]:
    """Time dense steps of a shape by rows and steps of drafters of it, all with random weights and without adapters.

    Args:
        shape: one of `larosa.benchmarks.shapes.SHAPES`.
        acceptances: of each sparsity's drafter.
        device: a GPU or the CPU.
        sparsities: of the drafters.
        draft: `int8` or `int4`, how drafters store their weights; None for as the dense model does.
        selection: whether drafters count or compare with thresholds, that keep as much of random tokens on average.
        dtype: of the dense model.
        layers: a cut of so many layers; None for all.
        vocab_size: another vocabulary than the shape's; None for its own.
        prompt_tokens: positions before those measured.
        rounds: times of each, which take turns; their medians are told.
        kv_cache_dtype: how keys and values are kept.
        compiled: on a GPU, measure compiled PyTorch too, whose compilation takes minutes.

    Raises:
        LarosaError: unknown shape, bad option, or too little memory.
    """
    for sparsity in sparsities:
        check_sparsity(sparsity)
    if len(acceptances) != len(sparsities):
        raise LarosaError(
            f"--acceptance: give one for each of the {len(sparsities)} sparsities, not {len(acceptances)}"
        )
    if prompt_tokens < 1 or rounds < 2:
        raise LarosaError("--prompt-tokens must be at least 1 and --tokens at least 2")
    config = shape_config(shape, layers=layers, vocab_size=vocab_size)
    stored = WeightFormat.FULL if draft is None else WeightFormat(choose(RoundedDraft, draft, "draft").value)
    form = random_quantization(stored)
    layout = Layout(config.num_hidden_layers, None, form)
    length = prompt_tokens + (rounds + 1) * _TOKENS + MAX_ROWS
    cache = cache_bytes(config, kv_cache_dtype.beside(dtype), length)
    on_gpu = device.type == "cuda"
    held = weight_bytes(config, dtype) + sparse_copies(sparsities) * weight_bytes(config, dtype, layout) + 2 * cache
    check_room(held + on_gpu * READ_BYTES, device)
    dense = DecoderWeights(random_model(config, dtype, device))
    times = _Times(dense, length, kv_cache_dtype, prompt_tokens)
    for row, (_, model) in enumerate(sparse_models(config, dtype, device, sparsities, layout, selection)):
        times.add_draft(row, DecoderWeights(model))
    seconds = times.measure(rounds)
    verify = [seconds["verify", rows] for rows in range(1, MAX_ROWS + 1)]
    plain = seconds.get(("dense", 0), verify[0])
    speed = None
    if on_gpu and compiled:
        found = measure_compiled(config, device=device, dtype=dtype, prompt_tokens=prompt_tokens, tokens=rounds)
        speed = found.tokens_per_second
    rows = []
    for row, (sparsity, acceptance) in enumerate(zip(sparsities, acceptances, strict=True)):
        drafting = seconds["draft", row]
        made = best(drafting, verify, acceptance)
        rows.append(
            ComposedRow(
                shape=shape_name(shape, layers, Layout()),
                dtype=str(dtype).removeprefix("torch."),
                draft=f"{draft or 'the same weights'}, {selection}",
                sparsity=sparsity,
                prompt_tokens=prompt_tokens,
                dense_ms=1e3 * plain,
                verify_ms=[1e3 * each for each in verify],
                draft_ms=1e3 * drafting,
                acceptance=acceptance.source,
                accepted_at=list(acceptance.at),
                drafted=made.drafted,
                tokens_per_pass=made.tokens,
                tokens_per_second=made.tokens / made.seconds,
                speedup=made.tokens / made.seconds * plain,
                compiled_tokens_per_second=speed,
            )
        )
    if on_gpu:
        return Benchmark(gpu_machine(device), gpu_read_bandwidth(device), rows)
    return Benchmark(machine(), read_bandwidth(), rows)


class _Times:
    """What takes turns: dense steps by rows, drafted tokens of each drafter, and the engine's own dense decoding."""

    def __init__(self, dense: DecoderWeights, length: int, kv_cache_dtype: CacheDtype, prompt_tokens: int) -> None:
        self._engine = Engine(dense, length, kv_cache_dtype)
        self._device, self._on_gpu = dense.device, dense.device.type == "cuda"
        self._clock: Clock = CudaClock(dense.device) if self._on_gpu else HostClock()
        self._sampler = Sampler(device=dense.device, kernels=self._on_gpu)
        prompt = torch.randint(len(dense.embedding), (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
        self._engine.prefill(prompt)
        #: Where what is timed begins.
        self._place = prompt_tokens
        steps = steps_of(self._engine)
        #: What is timed, and how many times at once.
        self._runs: dict[tuple[str, int], tuple[Callable[[], object], int]] = {}
        for rows in range(1, MAX_ROWS + 1):
            positions = torch.arange(self._place, self._place + rows, device=self._device)
            tokens = torch.arange(rows, device=self._device)

            def verify(tokens: torch.Tensor = tokens, positions: torch.Tensor = positions) -> None:
                self._sampler.accept(steps(tokens, positions, 0), tokens[1:], at_once=self._on_gpu)

            self._runs["verify", rows] = verify, 1
        if not self._on_gpu:  # where a step of one row is the engine's decoding
            return
        loop = GraphLoop(Engine(dense, length, kv_cache_dtype), self._sampler)
        loop.start(prompt)

        def decode() -> None:
            for _ in range(_TOKENS):
                loop.advance()

        self._runs["dense", 0] = decode, _TOKENS

    def add_draft(self, row: int, weights: DecoderWeights) -> None:
        """A drafter's tokens."""
        steps = steps_of(self._engine.beside(weights), 1)
        last = Last(torch.zeros(1, dtype=torch.int64, device=self._device), self._place, ahead=False)
        self._runs["draft", row] = lambda: run_ahead(steps, last, _BLOCK, self._sampler, 0), _BLOCK

    @torch.inference_mode()
    def measure(self, rounds: int) -> dict[tuple[str, int], float]:
        """Seconds of one, medians."""
        seconds: dict[tuple[str, int], list[float]] = {name: [] for name in self._runs}
        with advance("Timing", total=(rounds + 1) * len(self._runs)) as tick:
            for counted in [False, *[True] * rounds]:
                for name, (run, times) in self._runs.items():
                    first = self._clock.now()
                    run()
                    last = self._clock.now()
                    self._clock.wait(last)
                    taken = self._clock.seconds(first, last) / times
                    if counted:
                        seconds[name].append(taken)
                    tick()
        return {name: statistics.median(each) for name, each in seconds.items()}
