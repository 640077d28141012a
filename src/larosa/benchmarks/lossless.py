"""Lossless decoding beside the dense pass alone, on texts of a real model: what is drafted depends on the text."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch

from larosa.benchmarks.bandwidth import ReadTest
from larosa.benchmarks.gpu_decode import measure_compiled
from larosa.benchmarks.gpu_timing import gpu_machine, gpu_read_bandwidth
from larosa.benchmarks.machine import machine
from larosa.benchmarks.prompts import KINDS, prompts
from larosa.benchmarks.results import Benchmark
from larosa.decoding import CacheDtype, Engine
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.loop import continue_prompt, stop_tokens
from larosa.decoding.lossless import LosslessDecoder, Verifications
from larosa.decoding.sampling import Sampler
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError
from larosa.utils.progress import advance

#: The row of all kinds together.
ALL = "all"


@dataclass(frozen=True)
class LosslessRow:
    """The greedy texts after prompts of one kind; speeds in tokens a second, after the first token of each text.

    `acceptance` is the share of drafted tokens that were accepted, `tokens_per_pass` counts those of dense passes.
    `accepted_at` is that share of the model's drafts alone, by their place: see `Verifications.accepted_at`. On a GPU
    `compiled_tokens_per_second` is of compiled PyTorch, with random weights of that shape; None where it was left out.
    """

    kind: str
    draft: str
    texts: int
    tokens: int
    dense_tokens_per_second: float
    tokens_per_second: float
    speedup: float
    drafted: int
    acceptance: float | None
    tokens_per_pass: float
    accepted_at: list[float]
    compiled_tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class _Measured:
    """What texts of one kind have taken, dense and lossless."""

    def __init__(self) -> None:
        self.texts = self.tokens = 0
        self.dense = self.lossless = 0.0
        self.found = Verifications()

    def row(self, kind: str, draft: str, compiled: float | None) -> LosslessRow:
        counts = self.found.to_dict()
        return LosslessRow(
            kind=kind,
            draft=draft,
            texts=self.texts,
            tokens=self.tokens,
            dense_tokens_per_second=self.tokens / self.dense,
            tokens_per_second=self.tokens / self.lossless,
            speedup=self.dense / self.lossless,
            drafted=self.found.drafted,
            acceptance=counts["acceptance"],
            tokens_per_pass=counts["tokens_per_pass"] or 1.0,
            accepted_at=self.found.accepted_at(),
            compiled_tokens_per_second=compiled,
        )


def measure_lossless(
    model: Any,
    tokenizer: Any,
    *,
    draft: Any = None,
    draft_name: str = "text",
    tokens: int = 128,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    compiled: bool = True,
    drafted: int | None = None,
) -> Benchmark[LosslessRow]:
    """Continue the prompts of each kind greedily, each by the dense pass alone and losslessly, one after the other.

    Both are warmed up by one text before. That texts are the same is checked, token for token.

    Args:
        draft: see `LosslessDecoder`.
        draft_name: what rows call it.
        tokens: of a text at most, which ends where the model ends it.
        compiled: on a GPU, measure compiled PyTorch too, whose compilation takes minutes.
        drafted: have so many tokens drafted each time, by the model alone, to see how many of them are right.

    Raises:
        LarosaError: a model that cannot be run so, too little memory, or texts that are not the same.
    """
    if tokens < 2:
        raise LarosaError(f"--tokens must be at least 2, not {tokens}")
    texts = [(kind, ids) for kind in KINDS for ids in prompts(kind, model, tokenizer)]
    longest = max(len(ids) for _, ids in texts)
    lossless = LosslessDecoder(model, longest + tokens, kv_cache_dtype, draft, drafted=drafted)
    engine = Engine(DecoderWeights(model).whole(), longest + tokens, kv_cache_dtype)
    device, ends = engine.device, stop_tokens(model)
    on_gpu = device.type == "cuda"
    sampler = Sampler(device=device, kernels=on_gpu)
    graph = GraphLoop(engine, sampler) if on_gpu else None
    kinds = {kind: _Measured() for kind in (*KINDS, ALL)}
    reading = None if on_gpu else ReadTest()
    with advance("Decoding", total=1 + len(texts)) as tick:
        for number, (kind, ids) in enumerate([texts[0], *texts]):
            if reading is not None:
                reading.run()
            lossless.count_anew()
            prompt = ids[None]
            plain = graph.continue_prompt(prompt, tokens, ends) if graph else None
            expected, alone = _timed(plain or continue_prompt(engine, prompt, tokens, sampler, ends))
            found, together = _timed(lossless.continue_prompt(prompt, tokens, sampler, ends))
            if found != expected:
                place = next(i for i, pair in enumerate(zip_longest(found, expected)) if pair[0] != pair[1])
                raise LarosaError(
                    f"the texts after prompt {number} ({kind}) part at token {place + 1}: this is a bug of larosa, "
                    "please report it"
                )
            tick()
            if number == 0:
                continue
            for measured in (kinds[kind], kinds[ALL]):
                measured.texts += 1
                measured.tokens += len(found) - 1
                measured.dense += alone
                measured.lossless += together
                measured.found.add(lossless.verifications)
    speed = None
    if on_gpu and compiled:
        options = {"device": device, "dtype": model.dtype, "prompt_tokens": longest, "tokens": tokens}
        speed = measure_compiled(model.config, **options).tokens_per_second
    rows = [measured.row(kind, draft_name, speed) for kind, measured in kinds.items() if measured.tokens]
    if reading is None:
        return Benchmark(gpu_machine(device), gpu_read_bandwidth(device), rows)
    return Benchmark(machine(), reading.bandwidth, rows)


@torch.inference_mode()
def _timed(tokens: Iterable[int]) -> tuple[list[int], float]:
    """Tokens as they come, and the seconds from the first to the last."""
    found: list[int] = []
    for token in tokens:
        if not found:
            started = time.perf_counter()
        found.append(token)
    return found, time.perf_counter() - started
