"""The decode engine: one token after the other from a model's own weights, reading only what each token needs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from larosa.decoding.cache import Entries, KeyValueCache
from larosa.decoding.layers import MAX_ROWS, Past
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError
from larosa.formats import CacheDtype
from larosa.ops.cpu.graph import Graph


class Engine:
    """Decodes with a dense or converted model: one text or several, for which it has caches of the same length.

    Prompts run through the model's own forward; each further token is a row of one step over `torch.ops.larosa`,
    in which a site that keeps k of its entries reads k columns of its weights. Weights are laid out as
    `DecoderWeights` says, and not held twice; several engines can share them.

    Args:
        model: a loaded causal language model of a supported family, all on one device, in evaluation mode, or the
            `DecoderWeights` of one.
        max_length: tokens there is room for, prompt included.
        kv_cache_dtype: how keys and values are kept: `auto` as the model's weights, or `int8`, which rounds them and
            takes half the memory of 16 bits.
        texts: how many there is room for.

    Raises:
        LarosaError: a model that the engine cannot run, an unknown option, or too little memory for the cache.
    """

    def __init__(self, model: Any, max_length: int, kv_cache_dtype: str = CacheDtype.AUTO, texts: int = 1) -> None:
        self.weights = weights = model if isinstance(model, DecoderWeights) else DecoderWeights(model)
        self.max_length = max_length
        self.device = weights.device
        form = CacheDtype.parse(kv_cache_dtype).beside(weights.dtype)
        self._cache = KeyValueCache(weights.config, max_length, form, weights.device, texts)
        self._tables = weights.tables(max_length)
        #: What attention reads of the only text; None where there are several.
        self._one = self._past(self._cache.of(0), None) if texts == 1 else None
        # What a step starts from, at places that a CPU's graph can read again.
        self._hidden = torch.zeros(MAX_ROWS, weights.embedding.shape[1], dtype=torch.float32, device=weights.device)
        self._position, self._text = torch.zeros(2, MAX_ROWS, dtype=torch.int64, device=weights.device)
        self._graphs: dict[int, Graph] = {}
        # What ranks tell each other is no operator that a CPU's graph replays.
        self._replays = weights.device.type == "cpu" and weights.shard is None

    def beside(self, weights: DecoderWeights) -> Engine:
        """An engine of the same texts, over the same cache, with other weights of the model."""
        other = copy.copy(self)
        other.weights, other._graphs = weights, {}
        return other

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
        return self.logits(self.extend(prompt, 0)[-1:])

    @torch.inference_mode()
    def extend(self, tokens: torch.Tensor, start: int, text: int = 0) -> torch.Tensor:
        """Run the next tokens of a prompt behind its first `start`, and keep their keys and values.

        They attend to those before them as the cache keeps these, which rounds other sums than one run of the whole
        prompt does: the same pieces give the same bits.

        Args:
            tokens: [1, length] int64, at least one token.
            start: positions kept so far; what was kept behind them is forgotten.
            text: which one's.

        Returns:
            [length, D] float32 for `DecoderWeights.logits`.

        Raises:
            LarosaError: the prompt does not fit the cache.
        """
        length = start + tokens.shape[1]
        if not start < length <= self.max_length:
            raise LarosaError(f"a prompt of {length} tokens does not fit a cache of {self.max_length}")
        past = self._cache.past(start, self.weights.dtype, text)
        hidden = self.weights.forward(tokens, past)
        self._cache.fill(past, start, text)
        return hidden[0].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary] float32 for [N, D] of what `extend` gives."""
        return self.weights.logits(hidden)

    def take(self, other: Engine, length: int, source: int = 0, text: int = 0) -> None:
        """Keep the first keys and values of a text of an engine of the same weights and format."""
        self._cache.copy(other._cache, length, source, text)

    @torch.inference_mode()
    def step(
        self, token: torch.Tensor, position: torch.Tensor, texts: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run some tokens, of one text or of several, and keep their keys and values.

        Each gives what it gives alone, to the bit: those of one text behind those before them. Nothing in it waits for
        the device or looks at the values of tokens, positions and texts, so that a GPU's graph can hold it.

        Args:
            token: [B] int64, up to `MAX_ROWS`; on a GPU the first token stands in for `NO_TOKEN`.
            position: [B] int64, how many tokens came before each; less than `max_length`. Those of one text differ.
            texts: which one each token is of, for a graph [B] int64 on the device; None where all are of the first.

        Returns:
            [B, vocabulary] float32, the logits of the tokens that follow.
        """
        rows = len(token)
        if not 0 < rows <= MAX_ROWS:
            raise ValueError(f"a step runs 1 to {MAX_ROWS} tokens, not {rows}")
        if self._one is not None:
            past = self._one
        elif isinstance(texts, torch.Tensor) and self.device.type != "cpu":
            past = self._past(self._cache.layers, texts)
        else:
            text = self._text[:rows].copy_(torch.as_tensor((0,) * rows if texts is None else texts))
            past = self._past(self._cache.layers, text)
        if self.device.type != "cpu":
            return self._run(torch.ops.larosa.embed(self.weights.embedding, token), position, past)
        hidden, at = self._hidden[:rows], self._position[:rows]
        hidden.copy_(torch.embedding(self.weights.embedding, token))
        at.copy_(position)
        return self._replayed(hidden, at, past).clone() if self._replays else self._run(hidden, at, past)

    def _past(self, entries: list[Entries], cache: torch.Tensor | None) -> list[Past]:
        return [Past(*layer, *self._tables, cache) for layer in entries]

    def _run(self, x: torch.Tensor, position: torch.Tensor, past: list[Past]) -> torch.Tensor:
        """The step, operator by operator: logits [B, vocabulary] of embeddings x [B, D] at positions."""
        for layer, of_layer in zip(self.weights.layers, past, strict=True):
            x = layer(x, position, of_layer)
        return self.weights.logits(self.weights.final_norm.every(x))

    def _replayed(self, x: torch.Tensor, position: torch.Tensor, past: list[Past]) -> torch.Tensor:
        graph = self._graphs.get(len(x))
        if graph is None or graph.threads != torch.get_num_threads():
            self._graphs[len(x)] = graph = Graph(lambda: self._run(x, position, past))
            return graph.output
        return graph.replay()
