"""The decode engine: one token after the other from a model's own weights, reading only what each token needs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from larosa.architectures import Architecture, cache_argument, find_architecture
from larosa.config import LarosaConfig, Method
from larosa.decoding.cache import CacheDtype, KeyValueCache
from larosa.decoding.layers import norm, own, read_layers
from larosa.decoding.rope import rotary_tables
from larosa.errors import LarosaError
from larosa.ops.backend import check_kernels
from larosa.ops.cpu.graph import Graph
from larosa.ops.schema import has_kernels
from larosa.plain import check_plain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SILU = ("silu", "swish")


class Engine:
    """Decodes one sequence at a time with a dense or converted model.

    Prompts run through the model's own forward; each further token is one step over `torch.ops.larosa`,
    in which a site that keeps k of its entries reads k columns of its weights. No weight is copied: the
    linears that are read sparsely, on a GPU all of them, are laid out by columns in place. The model goes on
    working as before, and several engines can share it.

    Args:
        model: a loaded causal language model of a supported family, all on one device, in evaluation mode.
        max_length: tokens there is room for, prompt included.
        kv_cache_dtype: how keys and values are kept: `auto` as the model's weights, or `int8`, which rounds them and
            takes half the memory of 16 bits.

    Raises:
        LarosaError: a model that the engine cannot run, an unknown option, or too little memory for the cache.
    """

    def __init__(self, model: Any, max_length: int, kv_cache_dtype: str = CacheDtype.AUTO) -> None:
        check_plain(model)
        architecture = find_architecture(model.config.model_type)
        weight = architecture.embedding(model).weight
        _check(model, architecture)
        self.max_length = max_length
        self.device = weight.device
        self._decoder = architecture.decoder(model)
        cache_dtype = CacheDtype.parse(kv_cache_dtype).beside(weight.dtype)
        self._cache = KeyValueCache(model.config, max_length, cache_dtype, weight.device)
        tables = rotary_tables(model, architecture, max_length)
        self._layers = read_layers(model, architecture, self._cache, tables)
        self._embedding = weight.data
        self._final_norm = norm(architecture.final_norm(model))
        head = architecture.head(model)
        self._head = [head.weight.data], [own(head.bias)]
        # What a step starts from, at places that a CPU's graph can read again.
        self._hidden = torch.zeros(1, weight.shape[1], dtype=torch.float32, device=weight.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self._graph: Graph | None = None
        self._replays = weight.device.type == "cpu"

    @property
    def fixed_shapes(self) -> bool:
        """Whether steps can be captured: on a GPU, products wait for how many entries are above a threshold."""
        return self._replays or not any(layer.compares for layer in self._layers)

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return len(self._embedding)

    @torch.inference_mode()
    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Run a prompt and keep its keys and values, in place of all that was kept before.

        Args:
            prompt: [1, length] int64, at least one token.

        Returns:
            [1, vocabulary] float32, the logits of the token that follows.

        Raises:
            LarosaError: the prompt does not fit the cache.
        """
        length = prompt.shape[1]
        if not 0 < length <= self.max_length:
            raise LarosaError(f"a prompt of {length} tokens does not fit a cache of {self.max_length}")
        past = DynamicCache()
        hidden = self._decoder(
            prompt.to(self.device), **cache_argument(self._decoder, past), use_cache=True
        ).last_hidden_state
        self._cache.fill(past)
        # Not the model's head, which PyTorch would copy to multiply it with one row out of many.
        return self._logits(hidden[:, -1].float())

    @torch.inference_mode()
    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Run one token and keep its keys and values.

        Nothing in it waits for the device or looks at the arguments' values.

        Args:
            token: [1] int64; on a GPU the first token stands in for `NO_TOKEN`.
            position: [1] int64, how many tokens came before; less than `max_length`.

        Returns:
            [1, vocabulary] float32, the logits of the token that follows.
        """
        if self.device.type != "cpu":
            return self._run(torch.ops.larosa.embed(self._embedding, token), position)
        self._hidden.copy_(torch.embedding(self._embedding, token))
        self._position.copy_(position)
        return self._replayed().clone() if self._replays else self._run(self._hidden, self._position)

    def _run(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The step, operator by operator: logits [1, vocabulary] of an embedding x [1, D] at a position."""
        for layer in self._layers:
            x = layer(x, position)
        return self._logits(self._final_norm.every(x))

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.ops.larosa.linear(normed, *self._head)
        return logits

    def _replayed(self) -> torch.Tensor:
        if self._graph is None or self._graph.threads != torch.get_num_threads():
            self._graph = Graph(lambda: self._run(self._hidden, self._position))
            return self._graph.output
        return self._graph.replay()


def _check(model: Any, architecture: Architecture) -> None:
    """Refuse what the engine cannot run.

    Raises:
        LarosaError: the message says what it is.
    """
    config = model.config
    block = None if getattr(config, "larosa", None) is None else LarosaConfig.parse(config.larosa)
    weight = architecture.embedding(model).weight
    devices, dtype = {str(parameter.device) for parameter in model.parameters()}, weight.dtype
    reason, mend = None, ""
    if block is not None and block.method is Method.CATS:
        reason = "method cats"
    elif config.hidden_act not in _SILU or architecture.gate_activation_name is None:
        reason = f"an MLP with activation '{config.hidden_act}'"
    elif len(devices) > 1 or "meta" in devices:
        reason = f"a model spread over {', '.join(sorted(devices))}"
    elif dtype not in _DTYPES:
        reason = f"weights in {dtype}"
    elif not has_kernels(weight.device.type):
        reason = f"on {weight.device}, for which it has no kernels"
    elif block is not None and dtype is torch.float16 and weight.device.type == "cpu":
        # PyTorch takes a hundred times as long for a prompt with such weights laid out by columns.
        reason, mend = "sparse models in float16 on the CPU", "load it with --dtype bfloat16, or "
    if reason is not None:
        raise LarosaError(f"the larosa engine does not run {reason}: {mend}use --engine transformers")
    try:
        check_kernels(weight.device)
    except LarosaError as error:
        raise LarosaError(f"{error}, or use --engine transformers") from None
