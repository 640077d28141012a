"""What a model family calls its parts. The algorithm never names a module; it asks here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """The names of a family of pre-norm decoder models: RMSNorm, attention, gated MLP.

    Each layer must compute `x += attention(attention_norm(x)); x += mlp(mlp_norm(x))` with RMSNorms
    that scale by their weight, and every linear below must be a plain `nn.Linear`.
    """

    #: `model_type` of the family in `config.json`; dispatch is on nothing else.
    model_type: str
    config_class: type[Any]
    model_class: type[Any]
    causal_lm_class: type[Any]

    attention_name: str = "self_attn"
    mlp_name: str = "mlp"
    attention_norm_name: str = "input_layernorm"
    mlp_norm_name: str = "post_attention_layernorm"
    query_key_value_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_output_name: str = "o_proj"
    gate_up_names: tuple[str, ...] = ("gate_proj", "up_proj")
    down_name: str = "down_proj"

    @property
    def converted_model_type(self) -> str:
        """`model_type` of the family's sparsified checkpoints."""
        return f"larosa_{self.model_type}"

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of a causal language model or of its base model."""
        layers: nn.ModuleList = _base(model).layers
        return layers

    def embedding(self, model: nn.Module) -> nn.Embedding:
        """The token embedding, [vocabulary, hidden]."""
        embedding: nn.Embedding = _base(model).embed_tokens
        return embedding

    def final_norm(self, model: nn.Module) -> Any:
        """The RMSNorm between the last layer and the language-model head."""
        return _base(model).norm

    def head(self, model: Any) -> nn.Linear:
        """The language-model head, [vocabulary, hidden]."""
        head: nn.Linear = model.lm_head
        return head

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention block of a decoder layer."""
        return layer.get_submodule(self.attention_name)

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The MLP block of a decoder layer."""
        return layer.get_submodule(self.mlp_name)

    def norm(self, layer: nn.Module, site: str) -> Any:
        """The RMSNorm whose output is site h1 or h3."""
        return layer.get_submodule({"h1": self.attention_norm_name, "h3": self.mlp_norm_name}[site])

    def linears(self, layer: nn.Module, site: str) -> list[nn.Linear]:
        """The linears that read a site, in the order of the paper's Figure 2."""
        attention, mlp = self.attention(layer), self.mlp(layer)
        block, names = {
            "h1": (attention, self.query_key_value_names),
            "h2": (attention, (self.attention_output_name,)),
            "h3": (mlp, self.gate_up_names),
            "h4": (mlp, (self.down_name,)),
        }[site]
        return [getattr(block, name) for name in names]

    def unit_norm(self, norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        """RMSNorm of `hidden` [..., D] without its gain, in float32 or wider."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def _base(model: nn.Module) -> Any:
    return getattr(model, "model", model)
