"""GGUF files of tiny models, written as llama.cpp's converter writes them and independently of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

#: Bytes, three special words and three merges: a byte-level vocabulary.
MERGES = ["t h", "th e", "Ġ the"]
WORDS = ["<|end|>", "<|start|>", "<|turn|>", *bytes_to_unicode().values(), "th", "the", "Ġthe"]
VOCABULARY = len(WORDS) + 2  # an embedding may have rows that no word uses

_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def metadata_of(model: Any) -> dict[str, Any]:
    config, name = model.config, model.config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    words = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": WORDS,
        "token_type": [3] * 3 + [1] * (len(WORDS) - 3),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "padding_token_id": 2,
    }
    ours = {f"{name}.{key}": value for key, value in sizes.items()}
    return ours | {f"tokenizer.ggml.{key}": value for key, value in words.items()}


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """In float32; llama.cpp turns neighbouring entries of a head together, so llama's rows are in that order."""
    config, tensors = model.config, {}
    for name, weight in model.named_parameters():
        array = weight.float().numpy()
        stem, kind = name.rsplit(".", 1)
        if stem in ("model.embed_tokens", "model.norm", "lm_head"):
            new = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            new = f"blk.{layer}.{_PARTS[part]}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(_PARTS[part])
            if heads and config.model_type in ("llama", "smollm3"):
                array = _side_by_side(array, heads)
        tensors[f"{new}.{kind}"] = array
    return tensors


def _side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    size = len(rows) // heads
    order = [head * size + i + half * size // 2 for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write(
    path: Path,
    model: Any,
    changes: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    architecture: str | None = None,
    quantized: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a model; None in `changes` (of metadata) or `tensors` leaves that out.

    Args:
        quantized: the type of matrices.
    """
    writer = gguf.GGUFWriter(path, architecture or model.config.model_type)
    for key, value in (metadata_of(model) | (changes or {})).items():
        _add(writer, key, value)
    for name, array in (tensors_of(model) | (tensors or {})).items():
        if array is None:
            continue
        if quantized is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value is not None:
        adders[type(value)](key, value)
