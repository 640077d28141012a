"""Generating again and again takes no more memory than generating once."""

from __future__ import annotations

import os

import psutil
import pytest

import larosa
from larosa.data.bundled import bundled_model
from tests.examples import examples

#: By hand: LAROSA_SOAK=10000.
CALLS = int(os.environ.get("LAROSA_SOAK") or examples(150))
_MIB = 2**20


@pytest.mark.parametrize("engine", ["larosa", "transformers"])
def test_memory_does_not_grow(engine):
    model, tokenizer = larosa.load(bundled_model(), device="cpu")
    process = psutil.Process()

    def run(count):
        for seed in range(count):
            larosa.generate(
                model,
                tokenizer,
                "The river " * (1 + seed % 5),
                max_new_tokens=3,
                temperature=1,
                seed=seed,
                engine=engine,
            )
        return process.memory_info().rss / _MIB

    before = run(50)
    assert run(CALLS) - before < 4
