"""Llama models as GGUF files in their own dtype, and what is in a file of any type."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn

_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def write(model: Any, path: Path) -> Path:
    """Write a dense Llama without a vocabulary: what runs it gives and takes token ids.

    Matrices are written in the model's dtype, norms in float32. A folder gets the file when it is whole.
    """
    config = model.config
    if config.model_type != "llama" or config.rope_parameters["rope_type"] != "default":
        raise SystemExit("only a Llama without rope scaling is written as GGUF")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, weight in model.named_parameters():
        stored = weight.detach().float() if weight.dim() == 1 else weight.detach()
        name = tensor_name(name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns neighbouring entries of a head together, transformers those half a head apart
            stored = stored.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        data = stored.contiguous().view(torch.uint8) if stored.dtype is torch.bfloat16 else stored.contiguous()
        writer.add_tensor(name, data.numpy(), raw_dtype=_TYPES[stored.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(path)


def tensor_name(parameter: str) -> str:
    """What GGUF calls a parameter of a Llama."""
    stem, kind = parameter.rsplit(".", 1)
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


@torch.inference_mode()
def importance(model: Any, sequences: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean square of each input of a dense Llama's linears over token sequences, by their names in GGUF."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):

            def add(_: nn.Module, inputs: tuple[torch.Tensor], name: str = f"model.{name}.weight") -> None:
                squares = inputs[0].double().square().flatten(0, -2).sum(0)
                sums[name] = sums.get(name, 0) + squares

            hooks.append(module.register_forward_pre_hook(add))
    tokens = 0
    for sequence in sequences:
        model(sequence[None], use_cache=False)
        tokens += len(sequence)
    for hook in hooks:
        hook.remove()
    return {tensor_name(name): total / tokens for name, total in sums.items()}


@torch.no_grad()
def shuffle(model: Any) -> None:
    """Permute the channels of the residual stream, of values and of the MLP: the same function, other groups of inputs.

    A model that was dequantised from groups of 32 inputs is exact in the same type again, which says nothing of others.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    stream = torch.randperm(config.hidden_size, generator=generator)
    size, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    decoder = model.model
    for weight in {decoder.embed_tokens.weight, model.lm_head.weight}:
        weight.copy_(weight[:, stream])
    decoder.norm.weight.copy_(decoder.norm.weight[stream])
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[stream])
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[:, stream])
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(linear.weight[stream])
        inner = torch.randperm(config.intermediate_size, generator=generator)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[inner])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, inner])
        # Each key-value head in an order of its own, which the queries' heads that share it have at the output.
        orders = [torch.randperm(size, generator=generator) for _ in range(config.num_key_value_heads)]
        values = torch.cat([head * size + order for head, order in enumerate(orders)])
        outputs = torch.cat([head * size + orders[head // shared] for head in range(config.num_attention_heads)])
        attention.v_proj.weight.copy_(attention.v_proj.weight[values])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, outputs])


def sizes(path: Path) -> dict[str, float]:
    """What a token reads: bytes of the decoder's matrices, of the head (a tied embedding), and bits of a weight."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    linears = [tensor for name, tensor in tensors.items() if name.startswith("blk.") and len(tensor.shape) == 2]
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    decoder = sum(int(tensor.n_bytes) for tensor in linears)
    return {
        "file_bytes": path.stat().st_size,
        "decoder_bytes": decoder,
        "head_bytes": int(head.n_bytes),
        "bytes_per_token": decoder + int(head.n_bytes),
        "weight_bits": 8 * decoder / sum(int(tensor.n_elements) for tensor in linears),
    }
