"""Lossless decoding beside the dense pass alone, on texts of a real model: what is drafted depends on the text."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from larosa.benchmarks.bandwidth import ReadTest
from larosa.benchmarks.machine import machine
from larosa.benchmarks.prompts import KINDS, prompts
from larosa.benchmarks.results import Benchmark
from larosa.decoding import CacheDtype, Engine
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

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class _Measured:
    """What texts of one kind have taken, dense and lossless."""

    def __init__(self) -> None:
        self.texts = self.tokens = 0
        self.dense = self.lossless = 0.0
        self.found = Verifications()

    def row(self, kind: str, draft: str) -> LosslessRow:
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
        )


def measure_lossless(
    model: Any,
    tokenizer: Any,
    *,
    draft: Any = None,
    draft_name: str = "text",
    tokens: int = 128,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
) -> Benchmark[LosslessRow]:
    """Continue the prompts of each kind greedily, each by the dense pass alone and losslessly, one after the other.

    Both are warmed up by one text before. That texts are the same is checked.

    Args:
        draft: see `LosslessDecoder`.
        draft_name: what rows call it.
        tokens: of a text at most, which ends where the model ends it.

    Raises:
        LarosaError: a model that cannot be run so, too little memory, or texts that are not the same.
    """
    if tokens < 2:
        raise LarosaError(f"--tokens must be at least 2, not {tokens}")
    texts = [(kind, ids) for kind in KINDS for ids in prompts(kind, model, tokenizer)]
    length = max(len(ids) for _, ids in texts) + tokens
    lossless = LosslessDecoder(model, length, kv_cache_dtype, draft)
    dense = Engine(DecoderWeights(model).whole(), length, kv_cache_dtype)
    ends = stop_tokens(model)
    kinds = {kind: _Measured() for kind in (*KINDS, ALL)}
    reading = ReadTest()
    with advance("Decoding", total=1 + len(texts)) as tick:
        for number, (kind, ids) in enumerate([texts[0], *texts]):
            reading.run()
            before = Verifications(**vars(lossless.verifications))
            expected, plain = _timed(continue_prompt(dense, ids[None], tokens, Sampler(), ends))
            found, drafted = _timed(lossless.continue_prompt(ids[None], tokens, Sampler(), ends))
            if found != expected:
                raise LarosaError(f"the texts after prompt {number} differ: this is a bug of larosa, please report it")
            tick()
            if number == 0:
                continue
            for measured in (kinds[kind], kinds[ALL]):
                measured.texts += 1
                measured.tokens += len(found) - 1
                measured.dense += plain
                measured.lossless += drafted
                for name, count in vars(lossless.verifications).items():
                    setattr(measured.found, name, getattr(measured.found, name) + count - getattr(before, name))
    rows = [measured.row(kind, draft_name) for kind, measured in kinds.items() if measured.tokens]
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
