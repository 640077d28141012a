"""A model's weights as the decode engine reads them, laid out once and shared by every text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from larosa.architectures import Architecture, cache_argument, find_architecture
from larosa.config import LarosaConfig, Method
from larosa.decoding.head import read_head
from larosa.decoding.layers import norm, read_layers
from larosa.decoding.rope import rotary_tables
from larosa.errors import LarosaError
from larosa.formats import ColumnFormat
from larosa.models.plain import check_plain
from larosa.ops.backend import check_kernels
from larosa.ops.schema import has_kernels
from larosa.parallel import shard_of
from larosa.sparsity import SiteSizes
from larosa.utils.memory import available_memory
from larosa.utils.progress import track

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SILU = ("silu", "swish")


class DecoderWeights:
    """The weights of a dense or converted model, for any number of `Engine`s.

    No weight is copied: the linears that are read sparsely, on a GPU all of them, are laid out by columns in place. The
    model goes on working as before.

    Args:
        model: a loaded causal language model of a supported family, all on one device, in evaluation mode, or one
            rank's shard of one.

    Raises:
        LarosaError: a model that the engine cannot run.
    """

    def __init__(self, model: Any) -> None:
        #: What makes the model one of some ranks' shards; None for a whole one.
        self.shard = shard_of(model)
        if self.shard is None:
            check_plain(model)
        architecture = find_architecture(model.config.model_type)
        _check(model, architecture)
        self.config = model.config
        self.embedding = architecture.embedding(model).weight.data
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.layers = read_layers(model, architecture)
        self.final_norm = norm(architecture.final_norm(model))
        self._head = read_head(model, architecture)
        self._model, self._architecture = model, architecture
        self._decoder = architecture.decoder(model)
        self._prompts_whole = False
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def whole(self) -> DecoderWeights:
        """The same weights with nothing skipped, in prompts neither."""
        other = copy.copy(self)
        other.layers = [layer.whole() for layer in self.layers]
        other._head = self._head.whole()
        other._prompts_whole = True
        return other

    def rounded(self, linears: ColumnFormat, head: ColumnFormat) -> DecoderWeights:
        """The same with a copy of all weights by few bits, rounded to nearest, for steps; prompts run as before.

        Raises:
            LarosaError: a weight is NaN or Inf, and the message names the layer; or too little memory for the copy.
        """
        sizes = SiteSizes.of(self.config)
        needed = (sizes.linear_weights * linears.bits + self.embedding.numel() * head.bits) // 8
        free = available_memory(self.device)
        if needed > free:
            raise LarosaError(
                f"a copy of the weights by {linears.bits} bits needs {needed / 1e9:.2f} GB, where "
                f"{free / 1e9:.2f} GB are free"
            )
        other = copy.copy(self)
        layers = track(self.layers, "Rounding layers")
        other.layers = [layer.rounded(linears, f"layer {index}") for index, layer in enumerate(layers)]
        other._head = self._head.rounded(head)
        return other

    def tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions 0 to `length` - 1, each [length, d] float32.

        Raises:
            LarosaError: the model's rotary embedding depends on how long the text is, and changes before `length`.
        """
        if self._tables is None or len(self._tables[0]) < length:
            self._tables = rotary_tables(self._model, self._architecture, length)
        cos, sin = self._tables
        return cos[:length], sin[:length]

    def forward(self, tokens: torch.Tensor, past: Any) -> torch.Tensor:
        """Run tokens [1, length] of a prompt through the model's own forward, behind a transformers cache.

        Returns:
            [1, length, D], what the final norm gives; `past` then holds their keys and values.
        """
        cache = cache_argument(self._decoder, past)
        with self._dense_up_to(past.get_seq_length() + tokens.shape[1]):
            hidden: torch.Tensor = self._decoder(tokens.to(self.device), **cache, use_cache=True).last_hidden_state
        return hidden

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary] float32 for [N, D] float32 behind the final norm."""
        # Not the model's head, which PyTorch would copy to multiply it with one row out of many.
        own = self._head(normed)
        return own if self.shard is None else self.shard.logits(own)

    @contextmanager
    def _dense_up_to(self, position: int) -> Iterator[None]:
        """Leave what comes before a position dense where prompts are: of a cache that holds something a model cannot

        know whether a prompt is still going on.
        """
        layers: Any = self._architecture.layers(self._model)
        every = [layer.dense for layer in layers if hasattr(layer, "dense")]
        dense = [tokens for tokens in every if tokens.prompts or self._prompts_whole]
        for tokens in dense:
            tokens.before = position
        try:
            yield
        finally:
            for tokens in dense:
                tokens.before = 0


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
    forms = [] if block is None else [form.name for form in (block.linear_format, block.head_format) if form]
    try:
        check_kernels(weight.device, forms)
    except LarosaError as error:
        raise LarosaError(f"{error}, or use --engine transformers") from None
