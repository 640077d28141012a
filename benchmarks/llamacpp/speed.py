#!/usr/bin/env python3
"""Times a token of llama.cpp and of larosa's engine on the CPU, in turns in one process, on models of one shape.

    benchmarks/llamacpp/speed.py --shape llama-3.2-1b --threads 2 --json speed.json     # random weights
    benchmarks/llamacpp/speed.py smollm2 smol-int4 smol-int4-25 --threads 2 --json speed.json

Of checkpoints the first is the dense Llama, which llama.cpp stores in its types, the others what it was converted to.
Needs llama-cpp-python and gguf beside larosa, and an idle machine. GGUF files are made first, and kept in --folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import llama_cpp
import torch
from llamacpp_model import LlamaCppModel, quantize

from larosa.benchmarks.bandwidth import ReadTest
from larosa.benchmarks.machine import machine
from larosa.benchmarks.results import per_token
from larosa.benchmarks.shapes import (
    Layout,
    random_model,
    random_quantization,
    random_sparse_model,
    set_sparsity,
    shape_config,
)
from larosa.checkpoints.io import load
from larosa.config import Rotation
from larosa.decoding import Engine
from larosa.formats import WeightFormat
from larosa.sparsity.report import inspect_config

#: Tokens of each row in each turn; one before them is not counted.
_TURN = 8


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoints", nargs="*", help="a dense Llama's folder, and folders it was converted to")
    parser.add_argument("--shape", help="random weights of a Llama's shape instead, see larosa bench decode")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--weights", default="int4,int8", help="of the engine's rows of a shape")
    parser.add_argument("--sparsity", default="0,0.5", help="of the engine's rows of a shape")
    parser.add_argument("--types", default="Q4_0,Q4_K_M", help="as llama.cpp names them")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="counted for each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("gguf"), help="for GGUF files, by shape and type")
    parser.add_argument("--prepare", action="store_true", help="make the GGUF files and end")
    parser.add_argument("--json", type=Path, default=Path("speed.json"))
    given = parser.parse_args()
    if bool(given.shape) == bool(given.checkpoints):
        parser.error("give checkpoints or a --shape")
    return given


class Row:
    """An engine in the middle of a text of random tokens.

    Args:
        read: bytes of weights that a token reads.
    """

    def __init__(self, name: str, engine: Any, read: int, tokens: torch.Tensor, prompt_tokens: int) -> None:
        self.name, self.read = name, read
        self.seconds: list[float] = []
        self._engine, self._tokens, self._position = engine, tokens, prompt_tokens
        engine.prefill(tokens[None, :prompt_tokens])

    def run(self) -> None:
        """A turn."""
        for counted in range(_TURN + 1):
            at = self._position
            start = time.perf_counter()
            self._engine.step(self._tokens[at : at + 1], torch.tensor([at]))
            if counted:
                self.seconds.append(time.perf_counter() - start)
            self._position += 1


def main() -> None:
    """Make or load the models, time them in turns, print and write the rows."""
    given = options()
    torch.set_num_threads(given.threads)
    turns = -(-given.tokens // _TURN)
    length = given.prompt_tokens + turns * (_TURN + 1)
    dense, name = _dense(given)
    files = [(kind, _file(given, dense, name, kind)) for kind in given.types.split(",")]
    if given.prepare:
        return
    vocabulary = dense.config.vocab_size
    del dense
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    rows = []
    for kind, path in files:
        read = int(gguf_files.sizes(path)["bytes_per_token"])
        rows.append(Row(f"llama.cpp {kind}", LlamaCppModel(path, length), read, tokens, given.prompt_tokens))
    for label, model in _converted(given):
        read = inspect_config(model.config, parameters=False).bytes_per_token
        rows.append(Row(label, Engine(model, length), read, tokens, given.prompt_tokens))
    reading = ReadTest()
    for _ in range(turns):
        reading.run()
        for row in rows:
            row.run()
    content = {
        "machine": machine(),
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp_system": llama_cpp.llama_print_system_info().decode().strip(),
        "bandwidth": reading.bandwidth,
        "model": name,
        "prompt_tokens": given.prompt_tokens,
        "rows": [_measured(row, rows[0], reading.bandwidth) for row in rows],
    }
    print(f"reads {reading.bandwidth / 1e9:.1f} GB/s; over {rows[0].name}:")
    for row in content["rows"]:
        print(
            f"{row['row']:32} {row['ms_per_token']:8.2f} ms ({row['quarter']:.2f} to {row['three_quarters']:.2f}), "
            f"{row['bytes_per_token'] / 1e6:.0f} MB, {row['floor_fraction']:.0%} of the floor, {row['speedup']:.2f}x"
        )
    given.json.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _dense(given: argparse.Namespace) -> tuple[Any, str]:
    """The dense model, and what it is called."""
    if given.shape:
        config = shape_config(given.shape, layers=given.layers, vocab_size=given.vocab_size)
        cut = [f"{given.layers} layers"] if given.layers else []
        words = [f"vocabulary {given.vocab_size}"] if given.vocab_size else []
        return random_model(config, torch.bfloat16, torch.device("cpu")), ", ".join([given.shape, *cut, *words])
    path = given.checkpoints[0]
    return load(path).model, Path(path).resolve().name


def _file(given: argparse.Namespace, dense: Any, name: str, kind: str) -> Path:
    """The model's GGUF file of a type, made where it is not there."""
    given.folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace(", ", "-").replace(" ", "-")
    source, path = given.folder / f"{stem}-BF16.gguf", given.folder / f"{stem}-{kind}.gguf"
    if not path.exists():
        if not source.exists():
            gguf_files.write(dense, source)
        quantize(source, path, kind)
    return path


def _converted(given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The engine's models, each to be made an engine of before the next is asked for."""
    for path in given.checkpoints[1:]:
        yield path, load(path).model
    if not given.shape:
        return
    config = shape_config(given.shape, layers=given.layers, vocab_size=given.vocab_size)
    for weights in map(WeightFormat, given.weights.split(",")):
        layout = replace(Layout(), quantization=random_quantization(weights))
        for sparsity in map(float, given.sparsity.split(",")):
            model = random_sparse_model(
                config, torch.bfloat16, torch.device("cpu"), layout=layout, rotation=Rotation.NONE
            )
            if sparsity:
                set_sparsity(model, sparsity)
            yield f"larosa {weights}, {sparsity:.0%}", model


def _measured(row: Row, first: Row, bandwidth: float) -> dict[str, Any]:
    """A row's times: median, quartiles and 95th percentile, and how they compare."""
    quarter, median, three_quarters = statistics.quantiles(row.seconds, n=4, method="inclusive")
    return {
        "row": row.name,
        "tokens": len(row.seconds),
        **per_token(row.seconds, row.read, bandwidth),
        "quarter": 1e3 * quarter,
        "three_quarters": 1e3 * three_quarters,
        "speedup": statistics.median(first.seconds) / median,
    }


if __name__ == "__main__":
    main()
