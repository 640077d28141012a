"""The decode engine: one token after the other from a model's own weights, reading only what each token needs."""

from __future__ import annotations

from typing import Any

import torch

from larosa.decoding.cache import CacheDtype, KeyValueCache
from larosa.decoding.layers import Past
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError
from larosa.ops.cpu.graph import Graph


class Engine:
    """Decodes one sequence at a time with a dense or converted model.

    Prompts run through the model's own forward; each further token is one step over `torch.ops.larosa`,
    in which a site that keeps k of its entries reads k columns of its weights. Weights are laid out as
    `DecoderWeights` says, and not held twice; several engines can share them.

    Args:
        model: a loaded causal language model of a supported family, all on one device, in evaluation mode, or the
            `DecoderWeights` of one.
        max_length: tokens there is room for, prompt included.
        kv_cache_dtype: how keys and values are kept: `auto` as the model's weights, or `int8`, which rounds them and
            takes half the memory of 16 bits.

    Raises:
        LarosaError: a model that the engine cannot run, an unknown option, or too little memory for the cache.
    """

    def __init__(self, model: Any, max_length: int, kv_cache_dtype: str = CacheDtype.AUTO) -> None:
        self.weights = weights = model if isinstance(model, DecoderWeights) else DecoderWeights(model)
        self.max_length = max_length
        self.device = weights.device
        cache_dtype = CacheDtype.parse(kv_cache_dtype).beside(weights.dtype)
        self._cache = KeyValueCache(weights.config, max_length, cache_dtype, weights.device)
        cos, sin = weights.tables(max_length)
        entries = zip(self._cache.keys, self._cache.values, self._cache.scales, strict=True)
        self._past = [Past(*layer, cos, sin) for layer in entries]
        # What a step starts from, at places that a CPU's graph can read again.
        self._hidden = torch.zeros(1, weights.embedding.shape[1], dtype=torch.float32, device=weights.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=weights.device)
        self._graph: Graph | None = None
        self._replays = weights.device.type == "cpu"

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return len(self.weights.embedding)

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
        return self.weights.logits(self.extend(prompt, 0)[-1:])

    @torch.inference_mode()
    def extend(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Run the next tokens of a prompt behind its first `start`, and keep their keys and values.

        They attend to those before them as the cache keeps these, which rounds other sums than one run of the whole
        prompt does: the same pieces give the same bits.

        Args:
            tokens: [1, length] int64, at least one token.
            start: positions kept so far; what was kept behind them is forgotten.

        Returns:
            [length, D] float32 for `DecoderWeights.logits`.

        Raises:
            LarosaError: the prompt does not fit the cache.
        """
        length = start + tokens.shape[1]
        if not start < length <= self.max_length:
            raise LarosaError(f"a prompt of {length} tokens does not fit a cache of {self.max_length}")
        past = self._cache.past(start, self.weights.dtype)
        hidden = self.weights.forward(tokens, past)
        self._cache.fill(past, start)
        return hidden[0].float()

    def take(self, other: Engine, length: int) -> None:
        """Keep another engine's first keys and values, one of the same weights and format."""
        self._cache.copy(other._cache, length)

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
            return self._run(torch.ops.larosa.embed(self.weights.embedding, token), position)
        self._hidden.copy_(torch.embedding(self.weights.embedding, token))
        self._position.copy_(position)
        return self._replayed().clone() if self._replays else self._run(self._hidden, self._position)

    def _run(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The step, operator by operator: logits [1, vocabulary] of an embedding x [1, D] at a position."""
        for layer, past in zip(self.weights.layers, self._past, strict=True):
            x = layer(x, position, past)
        return self.weights.logits(self.weights.final_norm.every(x))

    def _replayed(self) -> torch.Tensor:
        if self._graph is None or self._graph.threads != torch.get_num_threads():
            self._graph = Graph(lambda: self._run(self._hidden, self._position))
            return self._graph.output
        return self._graph.replay()
