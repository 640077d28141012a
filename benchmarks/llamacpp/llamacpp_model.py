"""llama.cpp through the C interface of llama-cpp-python: quantisation, and a model called as larosa's engines are."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import torch

#: GGML_LOG_LEVEL_ERROR, which llama-cpp-python has no name for.
_ERROR = 4


@llama_cpp.llama_log_callback
def _errors_alone(level: int, text: bytes, data: object) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


llama_cpp.llama_log_set(_errors_alone, ctypes.c_void_p())
llama_cpp.llama_backend_init()


def quantize(source: Path, target: Path, kind: str, importance: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Let llama.cpp store a file's matrices in few bits, by its own choice of types for each.

    Args:
        kind: as llama.cpp names it: `Q4_0`, `Q4_K_M`.
        importance: its importance matrix, the mean square of each input of a tensor.
    """
    code = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if code is None:
        raise SystemExit(f"{kind}: llama.cpp has no such type")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = code, torch.get_num_threads()
    rows = {name: values.float().contiguous() for name, values in (importance or {}).items()}
    if rows:  # an array that ends with an empty entry
        entries = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for entry, (name, values) in zip(entries, rows.items(), strict=False):
            data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
            entry.name, entry.data, entry.size = name.encode(), data, len(values)
        parameters.imatrix = entries
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"{source}: llama.cpp could not make {kind} of it")
    return partial.rename(target)


class LlamaCppModel:
    """One text at a time.

    Args:
        path: of the GGUF file.
        length: tokens there is room for.
    """

    def __init__(self, path: Path, length: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = length
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SystemExit(f"{path}: llama.cpp cannot run it")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(length, 0, 1)

    def close(self) -> None:
        """Let go of its memory; it cannot be used any more."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary] float32 of a text [T] by itself."""
        self._forget()
        self._decode(tokens.tolist(), 0, every=True)
        return torch.stack([self._row(at) for at in range(len(tokens))])

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocabulary] after a prompt [1, length], in place of what was kept before."""
        self._forget()
        self._decode(prompt[0].tolist(), 0, every=False)
        return self._row(-1)[None]

    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocabulary] after one more token [1] at a position [1]."""
        self._decode(token.tolist(), int(position), every=False)
        return self._row(-1)[None]

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int], start: int, every: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, start + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = every or at == len(tokens) - 1
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not decode")

    def _row(self, at: int) -> torch.Tensor:
        row = llama_cpp.llama_get_logits_ith(self._context, at)
        return torch.frombuffer(
            (ctypes.c_float * self._vocabulary).from_address(ctypes.addressof(row.contents)), dtype=torch.float32
        ).clone()
