"""Tiny models and minimal settings: every experiment end to end in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from larosa.reproduce import ReproduceSettings
from larosa.reproduce.context import Context


@pytest.fixture(autouse=True)
def small_read_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a gibibyte takes longer to read than everything else here."""
    monkeypatch.setattr("larosa.benchmarks.bandwidth._BYTES", 1 << 20)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], tokenizer: Any) -> Path:
    """A dense Llama of 3 layers in its own folder."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., str]) -> dict[str, Path]:
    """Three texts of 8 windows of 16 tokens: to calibrate on, to evaluate, and another to calibrate on."""
    folder = tmp_path_factory.mktemp("texts")
    found = {}
    for seed, name in enumerate(("calibration", "evaluation", "other")):
        found[name] = folder / f"{name}.txt"
        found[name].write_text(words(8 * 16, seed), "utf-8")
    return found


@pytest.fixture(scope="session")
def settings(texts: dict[str, Path]) -> Callable[..., ReproduceSettings]:
    """settings(**changes): as small as they go."""

    def make(**changes: Any) -> ReproduceSettings:
        values = {
            "data": str(texts["evaluation"]),
            "calibration": str(texts["calibration"]),
            "num_sequences": 4,
            "sequence_length": 16,
            "max_sequences": 2,
            "search_sequences": 1,
            "lengths": (6, 4),
            "device": "cpu",
            **changes,
        }
        return ReproduceSettings(**values)

    return make


@pytest.fixture(scope="session")
def shared_context(
    dense: Path, settings: Callable[..., ReproduceSettings], tmp_path_factory: pytest.TempPathFactory
) -> Context:
    """One context for tests that only read, so that what one has measured serves the others."""
    return Context(str(dense), settings(), tmp_path_factory.mktemp("cache"))
