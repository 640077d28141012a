"""The command line in this process, and a checkpoint of a tiny random model for it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from larosa.cli.main import main

#: Enough calibration for a model of 32 hidden units, and no measurement.
QUICK = ("--num-sequences", "4", "--sequence-length", "32")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """cli("convert", ...): run `larosa convert ...` and give its exit status and output."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["larosa", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Outcome(exit_.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def refused(cli: Callable[..., Outcome]) -> Callable[..., str]:
    """refused(...): the one-line error of a command that must fail."""

    def run(*arguments: object) -> str:
        outcome = cli(*arguments)
        assert outcome.code == 1
        lines = outcome.err.strip().splitlines()
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("larosa: error: ")
        return lines[0].removeprefix("larosa: error: ")

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], tokenizer: Any) -> dict[str, Path]:
    """What `checkpoint` and `converted` are copies of."""
    folder = tmp_path_factory.mktemp("models")
    dense, output = folder / "dense", folder / "converted"
    make_model("llama", tie_word_embeddings=True).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["larosa", "convert", str(dense), str(output), *QUICK])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    return {"dense": dense, "converted": output}


@pytest.fixture
def checkpoint(models: dict[str, Path], tmp_path: Path) -> Path:
    """A dense Llama of 3 layers with a tied head, in its own folder."""
    return shutil.copytree(models["dense"], tmp_path / "dense")


@pytest.fixture
def converted(models: dict[str, Path], checkpoint: Path, tmp_path: Path) -> Path:
    """`checkpoint` at 50%."""
    return shutil.copytree(models["converted"], tmp_path / "converted")


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
