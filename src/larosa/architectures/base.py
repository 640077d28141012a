"""What a model family calls its parts. The algorithm never names a module; it asks here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from larosa.config import GATE
from larosa.errors import LarosaError

#: Looks at an activation [..., D]; what it returns, if anything, takes the activation's place.
Tap = Callable[[torch.Tensor], torch.Tensor | None]


class Heads(NamedTuple):
    """An attention's heads: how many have keys and values, how many queries share each, entries in one."""

    keys: int
    group: int
    size: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """Read the heads off a model's configuration."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = config.num_key_value_heads
        return cls(keys, config.num_attention_heads // keys, size)


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
    #: The one of them whose outputs are averaged, head by head, into h2.
    value_name: str = "v_proj"
    attention_output_name: str = "o_proj"
    gate_up_names: tuple[str, ...] = ("gate_proj", "up_proj")
    down_name: str = "down_proj"
    #: What the gate goes through before it multiplies `up`; None where the MLP has no gate.
    gate_activation_name: str | None = "act_fn"
    #: RMSNorms over each query and each key head, before the rotary embedding; None where there are none.
    query_key_norm_names: tuple[str, str] | None = None
    #: What an attention says whether it uses the rotary embedding by; None where every layer does.
    rotary_flag_name: str | None = None
    #: Of (config, layer): how many positions it attends to, the own one included; None for all.
    window: Callable[[Any, int], int | None] = lambda config, layer: None

    def __reduce__(self) -> tuple[Callable[[str], Architecture], tuple[str]]:
        # By name: functions of configurations cannot be pickled, and there is only one of each family.
        from larosa.architectures import find_architecture

        return find_architecture, (self.model_type,)

    @property
    def converted_model_type(self) -> str:
        """`model_type` of the family's sparsified checkpoints."""
        return f"larosa_{self.model_type}"

    def decoder(self, model: nn.Module) -> nn.Module:
        """A causal language model without its head: token ids to what the final norm gives."""
        decoder: nn.Module = _base(model)
        return decoder

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of a causal language model or of its base model."""
        layers: nn.ModuleList = _base(model).layers
        return layers

    @contextmanager
    def other_layers(self, model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Let others stand in for the decoder layers meanwhile."""
        base = _base(model)
        own = base.layers
        base.layers = nn.ModuleList(layers)
        try:
            yield
        finally:
            base.layers = own

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

    def replace_head(self, model: Any, make: Callable[[Any], nn.Module]) -> None:
        """Put in the place of the language-model head, which a base model does not have, what `make` makes of it."""
        if hasattr(model, "lm_head"):
            model.lm_head = make(model.lm_head)

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
        block, names = self._readers(layer, site)
        return [getattr(block, name) for name in names]

    def replace_linears(self, layer: nn.Module, site: str, make: Callable[[Any], nn.Module]) -> None:
        """Put in the place of each linear that reads a site what `make` makes of it."""
        block, names = self._readers(layer, site)
        for name in names:
            setattr(block, name, make(getattr(block, name)))

    def _readers(self, layer: nn.Module, site: str) -> tuple[nn.Module, tuple[str, ...]]:
        """The block with the linears that read a site, and their names in it."""
        attention, mlp = self.attention(layer), self.mlp(layer)
        return {
            "h1": (attention, self.query_key_value_names),
            "h2": (attention, (self.attention_output_name,)),
            "h3": (mlp, self.gate_up_names),
            "h4": (mlp, (self.down_name,)),
        }[site]

    def value(self, layer: nn.Module) -> nn.Linear:
        """The linear that gives the values, [keys x size, hidden], first head first."""
        value: nn.Linear = getattr(self.attention(layer), self.value_name)
        return value

    def query_key_norms(self, layer: nn.Module) -> tuple[Any, Any] | None:
        """The RMSNorms over each query and each key head; None where there are none."""
        if self.query_key_norm_names is None:
            return None
        query, key = (self.attention(layer).get_submodule(name) for name in self.query_key_norm_names)
        return query, key

    def score_scale(self, layer: nn.Module) -> float:
        """What the attention multiplies the products of queries and keys by."""
        attention: Any = self.attention(layer)
        return float(attention.scaling)

    def rotary(self, model: nn.Module) -> Any:
        """The module that gives the cosines and sines of positions."""
        return _base(model).rotary_emb

    def renew_rotary(self, model: Any) -> None:
        """Make `rotary` anew, for a model from the meta device: no checkpoint has the numbers in it."""
        base = _base(model)
        base.rotary_emb = type(base.rotary_emb)(model.config)

    def uses_rotary(self, layer: nn.Module) -> bool:
        """Whether a layer turns its queries and keys by position."""
        return self.rotary_flag_name is None or bool(getattr(self.attention(layer), self.rotary_flag_name))

    def check_site(self, site: str) -> None:
        """Make sure that the family has a site.

        Raises:
            LarosaError: it is the gate, and the family's MLP has none.
        """
        if site == GATE and self.gate_activation_name is None:
            raise LarosaError(f"model type '{self.model_type}' has no gated MLP, which method cats needs")

    def gate_activation(self, layer: nn.Module) -> nn.Module:
        """The module whose output act(gate(x)) multiplies up(x)."""
        assert self.gate_activation_name is not None, "checked by check_site"
        return self.mlp(layer).get_submodule(self.gate_activation_name)

    def set_gate_activation(self, layer: nn.Module, activation: nn.Module) -> None:
        """Put another module in the place of `gate_activation`."""
        assert self.gate_activation_name is not None, "checked by check_site"
        setattr(self.mlp(layer), self.gate_activation_name, activation)

    def tap(self, layer: nn.Module, site: str, tap: Tap) -> RemovableHandle:
        """Let `tap` see, and replace, the activations of a site or of the gate as a dense layer runs.

        It sees what the linears read, the norm's gain included, before any selector.
        """
        if site in ("h1", "h3"):
            return self.norm(layer, site).register_forward_hook(lambda _module, _inputs, output: tap(output))
        if site == GATE:
            return self.gate_activation(layer).register_forward_hook(lambda _module, _inputs, output: tap(output))
        (linear,) = self.linears(layer, site)
        return linear.register_forward_pre_hook(lambda _module, inputs: tap(inputs[0]))

    def tap_unit_norm(self, layer: nn.Module, site: str, tap: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Let `tap` see the input of site h1 or h3 before the norm's gain, in float32 or wider."""
        norm = self.norm(layer, site)
        return norm.register_forward_hook(lambda _module, inputs, _output: tap(self.unit_norm(norm, inputs[0])))

    def unit_norm(self, norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        """RMSNorm of `hidden` [..., D] without its gain, in float32 or wider."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument of a model's forward, whose name transformers 5.24 changed."""
    # Whoever wraps forward (accelerate's hooks) does it on the instance: the class still says the name.
    names = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def window_by_layer_type(config: Any, layer: int) -> int | None:
    """The sliding window of the layers that the configuration calls so."""
    window: int | None = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
    return window


def _base(model: nn.Module) -> Any:
    return getattr(model, "model", model)
