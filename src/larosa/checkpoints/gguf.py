"""Models in GGUF files: read whole, dequantized, and refused where anything in them would be lost.

transformers reads GGUF too, but drops what it has no name for (biases, rope factors, head sizes, the rules by
which text is split) without a word. Here every key that shapes the model and every tensor is used or refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from larosa.architectures import ARCHITECTURES, Architecture
from larosa.checkpoints.gguf_tokenizer import read_tokenizer
from larosa.errors import LarosaError

#: GGUF's architectures that are supported, which are named like the families; Mistral's files say `llama`.
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
#: Those whose rows of queries and keys a file has in another order: pairs that turn together side by side.
_INTERLEAVED = ("llama", "smollm3")
_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_ROPE = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
#: What changes nothing at the value given; None at any.
_HARMLESS = {
    "vocab_size": None,  # the embedding says it
    "tensor_data_layout": None,
    "rope.scaling.finetuned": None,
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """An open GGUF file: its metadata, and its tensors as they are stored.

    Args:
        path: must exist.

    Raises:
        LarosaError: it is no whole GGUF file of a supported architecture, or the package `gguf` is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError:
            raise LarosaError(f"{path}: GGUF files need a package: pip install 'larosa[gguf]'") from None
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise LarosaError(f"{path}: {'not a GGUF file, whatever its name says' if magic else 'an empty file'}")
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            raise LarosaError(f"{path}: truncated or corrupt GGUF file ({reason}); fetch it again") from None
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self.name = str(self.metadata.get("general.architecture"))
        if self.name not in _ARCHITECTURES:
            supported = ", ".join(_ARCHITECTURES)
            raise LarosaError(f"{path}: GGUF architecture {self.name!r} is not supported; supported: {supported}")
        if self.metadata.get("split.count", 0) > 1:
            raise LarosaError(f"{path}: one of several parts; join them first (llama-gguf-split --merge)")

    @property
    def architecture(self) -> Architecture:
        """The model family."""
        return ARCHITECTURES[self.name]

    def get(self, key: str, default: Any = None) -> Any:
        """What the file says under `ARCHITECTURE.key`; floats as short as they were before they became float32."""
        value = self.metadata.get(f"{self.name}.{key}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def array(self, name: str) -> np.ndarray:
        """A tensor, dequantized: float32, in PyTorch's order of dimensions."""
        from gguf import dequantize

        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type)


def find_gguf(path: str) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without config.json; else None.

    Raises:
        LarosaError: the file does not exist, or the folder has several.
    """
    place = Path(path)
    if place.is_dir():
        if (place / "config.json").exists() or not (files := sorted(place.glob("*.gguf"))):
            return None
        if len(files) > 1:
            raise LarosaError(f"{path}: {len(files)} GGUF files and no config.json; name one, such as {files[0]}")
        return files[0]
    if place.suffix.lower() != ".gguf":
        return None
    if not place.is_file():
        raise LarosaError(f"{path}: no such file")
    return place


def load_gguf_config(path: Path) -> Any:
    """The configuration of the model in a GGUF file, by its metadata and the names of its tensors.

    Raises:
        LarosaError: the file is not readable or not supported, or its metadata say what would be lost.
    """
    file = _open(path)
    with _malformed(path):
        return _config(file)


def load_gguf(path: Path, config: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model of a GGUF file, its weights dequantized and rounded once to `dtype`, and its tokenizer.

    Args:
        config: `load_gguf_config`'s.

    Raises:
        LarosaError: weights are missing, unknown, of a wrong shape or of an unsupported type; unknown tokenizer.
    """
    file = _open(path)
    with _malformed(path):
        tokenizer = read_tokenizer(path, file.metadata, config.vocab_size, config.max_position_embeddings)
        names = _weight_names(file, config)
        weights = {names[name]: _weight(file, name, config).to(dtype) for name in names}
        model = file.architecture.causal_lm_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model, tokenizer


def _open(path: Path) -> GgufFile:
    # A command opens its model several times, and a vocabulary takes the package seconds.
    state = path.stat()
    return _opened(path.absolute(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _opened(path: Path, modified: int, size: int) -> GgufFile:
    return GgufFile(path)


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    try:
        yield
    except (LarosaError, RuntimeError):
        raise
    except KeyError as error:
        raise LarosaError(f"{path}: the metadata lack {error}") from error
    except Exception as error:  # tokenizers raises nothing more special
        reason = str(error).strip().partition("\n")[0]
        raise LarosaError(f"{path}: malformed metadata ({reason})") from error


def _config(file: GgufFile) -> Any:
    _check_keys(file)
    if "token_embd.weight" not in file.tensors:
        raise LarosaError(f"{file.path}: tensor 'token_embd.weight' is missing")
    file.metadata.setdefault(f"{file.name}.attention.head_count_kv", file.get("attention.head_count"))
    for key in _SIZES:
        if not isinstance(file.metadata[f"{file.name}.{key}"], (int, float)):
            raise LarosaError(f"{file.path}: '{file.name}.{key}' is not one number for all layers; not supported")
    sizes = {name: file.get(key) for key, name in _SIZES.items()}
    said = {file.get(key) for key in _HEAD_SIZES} - {None}
    if len(said) > 1:
        raise LarosaError(f"{file.path}: {', '.join(_HEAD_SIZES)} must all be the same, found {sorted(said)}")
    head_dim = said.pop() if said else sizes["hidden_size"] // sizes["num_attention_heads"]
    special = {name: file.metadata.get(f"tokenizer.ggml.{name}") for name in ("eos_token_id", "eot_token_id")}
    ends = list(dict.fromkeys(end for end in special.values() if end is not None))
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }
    return file.architecture.config_class(
        **sizes,
        **({} if file.name == "qwen2" else {"head_dim": head_dim, **biases}),  # qwen2's are as they are
        vocab_size=file.tensors["token_embd.weight"].data.shape[0],
        rope_parameters=_rope(file, head_dim),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
        dtype=torch.bfloat16,
    )


def _check_keys(file: GgufFile) -> None:
    known = {*_SIZES, *_HEAD_SIZES, *_ROPE}
    for full in file.metadata:
        key = full.removeprefix(f"{file.name}.")
        if key == full or key in known:
            continue
        value, harmless = file.get(key), _HARMLESS.get(key)
        if key in ("expert_count", "expert_used_count") and value:
            raise LarosaError(f"{file.path}: a mixture of experts, which is not supported")
        if key == "attention.sliding_window" and (not value or value >= file.get("context_length", 0)):
            continue
        if key not in _HARMLESS or (harmless is not None and value != harmless):
            raise LarosaError(f"{file.path}: {full!r} = {value!r:.40} is not supported; leaving it out would be wrong")


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    base = float(file.get("rope.freq_base", 10000.0))
    kind, factor = file.get("rope.scaling.type", "none"), file.get("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise LarosaError(f"{file.path}: rope scaling {kind!r} is not supported; supported: none, linear")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind == "linear" and factor not in (0.0, 1.0):
        rope |= {"rope_type": "linear", "factor": factor}
    if _ROPE_FACTORS in file.tensors:
        if rope["rope_type"] == "linear":
            raise LarosaError(f"{file.path}: rope scaling 'linear' beside '{_ROPE_FACTORS}' is not supported")
        rope |= _llama3_rope(file, base, head_dim)
    return rope


def _llama3_rope(file: GgufFile, base: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's rope scaling, of which a file has only what it divides each frequency by."""
    factors = file.array(_ROPE_FACTORS).astype(np.float64)
    factor, low, high, context = float(factors.max()), 1.0, 4.0, 8192
    turns = context / (2 * math.pi) * base ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise LarosaError(f"{file.path}: the factors in '{_ROPE_FACTORS}' are not Llama 3's; not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _weight_names(file: GgufFile, config: Any) -> dict[str, str]:
    """The model's name of each of the file's tensors, once all are known to be there, and right."""
    with torch.device("meta"):
        shapes = {
            name: tuple(weight.shape) for name, weight in file.architecture.causal_lm_class(config).named_parameters()
        }
    names = {name: _model_name(file.architecture, name) for name in file.tensors if name != _ROPE_FACTORS}
    for name, target in names.items():
        if target not in shapes:
            raise LarosaError(f"{file.path}: tensor {name!r} has no place in a {file.name} model; not supported")
    if missing := sorted(shapes.keys() - names.values()):
        raise LarosaError(f"{file.path}: {len(missing)} weights are missing, the first is '{missing[0]}'")
    for name, target in names.items():
        tensor = file.tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != shapes[target]:
            raise LarosaError(f"{file.path}: tensor {name!r} is {shape}, the metadata say {shapes[target]}")
        if not _is_supported(tensor.tensor_type):
            raise LarosaError(f"{file.path}: tensor {name!r} is of type {tensor.tensor_type.name}; not supported")
    return {name: target for name, target in names.items() if target is not None}


def _is_supported(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _model_name(architecture: Architecture, name: str) -> str | None:
    """What the family calls a tensor of a file; None for what it does not have."""
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    a, queries = architecture, architecture.query_key_value_names
    inside = {
        "attn_norm": a.attention_norm_name,
        "ffn_norm": a.mlp_norm_name,
        **{f"attn_{letter}": f"{a.attention_name}.{part}" for letter, part in zip("qkv", queries, strict=True)},
        "attn_output": f"{a.attention_name}.{a.attention_output_name}",
        **{f"ffn_{x}": f"{a.mlp_name}.{part}" for x, part in zip(("gate", "up"), a.gate_up_names, strict=True)},
        "ffn_down": f"{a.mlp_name}.{a.down_name}",
    }
    if a.query_key_norm_names is not None:
        inside |= {
            f"attn_{x}_norm": f"{a.attention_name}.{part}" for x, part in zip("qk", a.query_key_norm_names, strict=True)
        }
    stem, _, kind = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    return f"model.layers.{found[1]}.{inside[found[2]]}.{kind}" if found and found[2] in inside else None


def _weight(file: GgufFile, name: str, config: Any) -> torch.Tensor:
    array = file.array(name)
    part = name.split(".")[-2]
    if file.name in _INTERLEAVED and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return torch.from_numpy(np.array(array))  # a copy: F32 tensors are views of the file, which is read-only
