#!/usr/bin/env python3
"""What llama.cpp's quantisations of a Llama lose, by llama.cpp's own logits on the windows that `larosa eval` takes.

    benchmarks/llamacpp/quality.py MODEL --data wiki.test.raw --types Q4_0,Q4_K_M --json quality.json
    benchmarks/llamacpp/quality.py MODEL --data wiki.test.raw --calibration wiki.train.raw   # importance matrices too

Needs llama-cpp-python and gguf beside larosa. The dense logits are transformers' in float32. `larosa reproduce frontier
--llama-cpp quality.json` draws the rows beside its own where model and windows are the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files
import llama_cpp
import torch
from llamacpp_model import LlamaCppModel, quantize

from larosa.calibration import calibration_sequences
from larosa.checkpoints.io import load, load_config
from larosa.evaluation.divergence import Comparison, TokenScores
from larosa.evaluation.perplexity import evaluation_windows
from larosa.reproduce.cache import fingerprint
from larosa.reproduce.context import token_digest


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder of a dense Llama")
    parser.add_argument("--data", default="bundled")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--max-sequences", type=int, default=2)
    parser.add_argument("--types", default="F32,Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_1,Q4_0", help="as llama.cpp names them")
    parser.add_argument("--calibration", help="a text for importance matrices: 16 x 256 tokens of it")
    parser.add_argument("--shuffle", action="store_true", help="another order of channels, see `gguf_files.shuffle`")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure each type, and write all rows."""
    given = options()
    model, tokenizer = load(given.model, dtype="float32")
    windows = evaluation_windows(model, tokenizer, given.data, given.sequence_length, given.max_sequences)
    dense = [_logits(model, window) for window in windows]
    sequences = None
    if given.calibration:
        sequences = calibration_sequences(
            given.calibration, model, tokenizer, num_sequences=16, sequence_length=256, seed=0
        )
    if given.shuffle:
        gguf_files.shuffle(model)
    content: dict[str, Any] = {
        "model": Path(given.model).resolve().name,
        "fingerprint": fingerprint(given.model, load_config(given.model)),
        "windows": token_digest(windows),
        "data": Path(given.data).name,
        "shape": list(windows.shape),
        "shuffled": given.shuffle,
        "llama_cpp_python": llama_cpp.__version__,
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=given.json.absolute().parent) as folder:
        for name, path in files(model, sequences, given.types.split(","), Path(folder)):
            row = {"type": name, **gguf_files.sizes(path), **measured(path, windows, dense)}
            content["rows"].append(row)
            given.json.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
            print(f"{name}: {row['weight_bits']:.2f} bits, KL {row['kl']:.4f}, top-1 {row['top1']:.1%}", flush=True)


@torch.inference_mode()
def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(window[None], use_cache=False).logits[0]
    return logits


def files(model: Any, sequences: torch.Tensor | None, types: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """The model in each type, one file at a time; with `sequences` those of few bits by importance matrices too."""
    source = gguf_files.write(model, folder / "F32.gguf")
    weights = None if sequences is None else gguf_files.importance(model, sequences)
    for kind in types:
        if kind == "F32":
            yield kind, source
            continue
        for name, importance in ((kind, None), (f"{kind}, importance matrix", weights)):
            if importance is not None or name == kind:
                path = quantize(source, folder / f"{kind}.gguf", kind, importance)
                yield name, path
                path.unlink()


def measured(path: Path, windows: torch.Tensor, dense: list[torch.Tensor]) -> dict[str, float | None]:
    """A file's distance from the dense logits [T, vocabulary] of each of the windows."""
    running = LlamaCppModel(path, windows.shape[1])
    parts = [
        TokenScores.of(running.logits(window)[:-1], logits[:-1], window[1:])
        for window, logits in zip(windows, dense, strict=True)
    ]
    running.close()
    scores = TokenScores.joined(parts)
    found = Comparison.of(scores)
    assert found is not None, "there is a reference"
    kl = found.kl_divergence.mean
    perplexity = scores.perplexity().value
    return {"kl": kl.value, "kl_stderr": kl.stderr, "top1": found.same_top_token.value, "perplexity": perplexity}


if __name__ == "__main__":
    main()
