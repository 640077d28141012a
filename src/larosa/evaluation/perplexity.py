"""Perplexity by the GPTQ and SliceGPT convention, and the divergence from a dense reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import cycle
from typing import Any

import torch

from larosa.architectures import cache_argument, find_architecture
from larosa.architectures.context import context_length
from larosa.calibration.layers import decoder_outputs
from larosa.calibration.precision import float32_arithmetic
from larosa.data.text import BUNDLED, TextSplit, read_text, tokenize
from larosa.decoding.cache import RoundedCache
from larosa.errors import LarosaError, choose
from larosa.evaluation.divergence import Comparison, TokenScores
from larosa.evaluation.zeros import Spread, ZeroCounter, sparse_prompts
from larosa.formats import CacheDtype
from larosa.parallel import whole_config
from larosa.sparsity.report import Sparsity, sparsity_of
from larosa.utils.finite import not_finite
from larosa.utils.layer_files import is_streamed
from larosa.utils.progress import track

DEFAULT_SEQUENCE_LENGTH = 2048

#: Of reports: small, so that a conversion is not held up by what it tells.
_REPORTED_WINDOWS, _REPORTED_LENGTH = 8, 512


class Protocol(StrEnum):
    """Which tokens of a window run sparse and are scored.

    All of them, but for the first that the model leaves dense itself; or those that follow a dense prompt, as in
    decoding.
    """

    ALL = "all"
    CONTINUATION = "continuation"

    @classmethod
    def parse(cls, name: str) -> Protocol:
        """The protocol of this name.

        Raises:
            LarosaError: there is none.
        """
        return choose(cls, name, "protocol")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    `perplexity_stderr` takes tokens as independent, and is None for a single one. `kl_divergence` (nats per token,
    dense to this model) and `top1_agreement` (share of tokens whose likeliest next token is the dense model's) are the
    means of `comparison`, which has all that llama.cpp tells of a quantised model; the three are None without a
    reference. `tokens` counts the scored predictions: of all tokens of a window but the first or, where a prompt of
    `prompt_length` tokens ran dense, of those that follow the first one behind it. `sparsity` is what the configuration
    promises; `zeros` (by site, over tokens and layers) and `actual_sparsity` (share of the decoder's weights that a
    token skips) are what was counted, None for a dense model.
    """

    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    windows: int
    sequence_length: int
    protocol: Protocol
    prompt_length: int
    kl_divergence: float | None
    top1_agreement: float | None
    comparison: Comparison | None
    sparsity: Sparsity
    zeros: dict[str, Spread] | None
    actual_sparsity: Spread | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def evaluate(
    model: Any,
    tokenizer: Any,
    data: str = BUNDLED,
    *,
    sequence_length: int | None = None,
    max_sequences: int | None = None,
    reference: Any = None,
    kv_cache_dtype: str = CacheDtype.AUTO,
    protocol: str = Protocol.ALL,
    prompt_length: int | None = None,
) -> Evaluation:
    """Perplexity of a dense or converted model on a text, and its distance from a dense reference.

    The text is joined, tokenized whole and cut into non-overlapping windows, each scored on its own; a
    last incomplete window is dropped. Prompt sparsity is on for the measurement whatever the model's
    `prefill` setting, since it stands for decoding.

    Args:
        data: `bundled`, `wikitext2`, `c4`, or a .txt/.json/.jsonl file or folder.
        sequence_length: window length in tokens; None is 2048 or the model's context if that is shorter.
        max_sequences: score only the first so many windows.
        reference: the dense model; may be on another device.
        kv_cache_dtype: `int8` rounds all of the model's keys and values to 8 bits, as the engine with that option does
            (but it attends to a prompt from within the prompt before it rounds it).
        protocol: `all` scores every position, sparse but for what the model itself leaves dense; `continuation` runs
            the beginning of each window dense, as a prompt, and what follows sparse, and scores what the sparse tokens
            predict.
        prompt_length: tokens of that prompt; None is half the window.

    Raises:
        LarosaError: unusable text, a vocabulary mismatch, an unknown option, NaN or Inf logits.
    """
    cache_dtype, chosen = CacheDtype.parse(kv_cache_dtype), Protocol.parse(protocol)
    windows = evaluation_windows(model, tokenizer, data, sequence_length, max_sequences)
    prompt = prompt_tokens(chosen, prompt_length, windows.shape[1])
    dense = None
    if reference is not None:
        if reference.config.vocab_size != model.config.vocab_size:
            raise LarosaError(
                f"the reference has a vocabulary of {reference.config.vocab_size}, the model of "
                f"{model.config.vocab_size}: not the model it was converted from"
            )
        dense = _Logits(reference).of
    return evaluate_windows(model, windows, dense, cache_dtype, prompt)


def prompt_tokens(protocol: Protocol, asked: int | None, length: int) -> int:
    """How many tokens of a window run dense as a prompt; 0 where there is none.

    Args:
        asked: the user's choice; None is half the window.
        length: the window's tokens.

    Raises:
        LarosaError: a prompt that leaves nothing to score, or one that the protocol has not.
    """
    if protocol is Protocol.ALL:
        if asked is not None:
            raise LarosaError("--prompt-length is of the dense prompt: give --protocol continuation with it")
        return 0
    prompt = length // 2 if asked is None else asked
    if not 1 <= prompt <= length - 2:
        raise LarosaError(
            f"--prompt-length {prompt} must be at least 1 and leave 2 of the window's {length} tokens, the first of "
            "which predicts the second"
        )
    return prompt


def evaluation_windows(
    model: Any, tokenizer: Any, data: str, sequence_length: int | None, max_sequences: int | None
) -> torch.Tensor:
    """The windows that `evaluate` scores, [number, length] int64.

    Raises:
        LarosaError: the text does not fill one window, or the length does not suit the model.
    """
    context = context_length(model.config)
    length = min(DEFAULT_SEQUENCE_LENGTH, context) if sequence_length is None else sequence_length
    if not 2 <= length <= context:
        raise LarosaError(f"--sequence-length {length} is outside the model's context of 2 to {context}")
    if max_sequences is not None and max_sequences < 1:
        raise LarosaError(f"--max-sequences must be at least 1, not {max_sequences}")
    ids = tokenize(read_text(data, TextSplit.TEST), tokenizer, model.config.vocab_size)
    count = min(len(ids) // length, max_sequences or len(ids))
    if count == 0:
        raise LarosaError(f"'{data}' has {len(ids)} tokens, less than one window: lower --sequence-length")
    return ids[: count * length].view(count, length)


def report_windows(model: Any, tokenizer: Any) -> torch.Tensor:
    """What reports and cards measure on: few windows of the bundled text, [number, length] int64."""
    length = min(_REPORTED_LENGTH, context_length(model.config))
    return evaluation_windows(model, tokenizer, BUNDLED, length, _REPORTED_WINDOWS)


@torch.inference_mode()
def evaluate_windows(
    model: Any,
    windows: torch.Tensor,
    reference: Callable[[torch.Tensor], torch.Tensor] | None,
    kv_cache_dtype: CacheDtype = CacheDtype.AUTO,
    prompt_length: int = 0,
) -> Evaluation:
    """Score windows [number, length]; `reference` maps one window [1, length] to dense logits.

    With a `prompt_length` so many tokens of each window run dense and only what follows is scored.
    """
    logits_of = _Logits(model, kv_cache_dtype)
    parts = []
    scored = slice(prompt_length, -1)  # the positions whose predictions count
    with sparse_prompts(model, dense_before=prompt_length), ZeroCounter(model) as zeros:
        for window, of_window in zip(windows, track(logits_of(windows), "Evaluating", len(windows)), strict=True):
            logits = of_window[0, scored]
            dense = None if reference is None else reference(window[None])[0, scored]
            parts.append(TokenScores.of(logits, dense, window[prompt_length + 1 :]))
    scores = TokenScores.joined(parts)
    if not scores.finite:
        raise not_finite("the model's logits are", model.get_input_embeddings().weight.dtype)
    perplexity, comparison = scores.perplexity(), Comparison.of(scores)
    return Evaluation(
        perplexity=perplexity.value,
        perplexity_stderr=perplexity.stderr,
        tokens=len(scores.loss),
        windows=len(windows),
        sequence_length=windows.shape[1],
        protocol=Protocol.CONTINUATION if prompt_length else Protocol.ALL,
        prompt_length=prompt_length,
        kl_divergence=None if comparison is None else comparison.kl_divergence.mean.value,
        top1_agreement=None if comparison is None else comparison.same_top_token.value,
        comparison=comparison,
        sparsity=sparsity_of(whole_config(model)),
        zeros=zeros.fractions(),
        actual_sparsity=zeros.actual_sparsity(),
    )


def _device_arithmetic(model: Any) -> AbstractContextManager[None]:
    return float32_arithmetic(model, model.get_input_embeddings().weight.device)


class _Logits:
    """A model as a function from windows [number, T] to the logits of each, [1, T, vocabulary]."""

    def __init__(self, model: Any, kv_cache_dtype: CacheDtype = CacheDtype.AUTO) -> None:
        self._model = model
        self._rounds = kv_cache_dtype is not CacheDtype.AUTO
        self._cache_format = kv_cache_dtype.beside(model.dtype)
        self._device = model.get_input_embeddings().weight.device

    def __call__(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        if is_streamed(self._model):
            yield from self._layer_by_layer(windows)
            return
        for window in windows:
            cache = RoundedCache(self._cache_format) if self._rounds else None
            with _device_arithmetic(self._model):
                kept = cache_argument(self._model, cache)
                ids = window[None].to(self._device)
                logits: torch.Tensor = self._model(ids, use_cache=self._rounds, **kept).logits
            yield logits

    def of(self, window: torch.Tensor) -> torch.Tensor:
        """The logits of one window [1, T]."""
        return next(self(window))

    def _layer_by_layer(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        assert not self._rounds, "a conversion measures without a cache"
        architecture = find_architecture(self._model.config.model_type)
        head = architecture.head(self._model)
        for hidden in decoder_outputs(self._model, architecture, windows):
            with float32_arithmetic(head, self._device):
                logits: torch.Tensor = head(hidden)
            yield logits


class RecordedLogits:
    """Logits of a model that is about to change, kept as what its head reads, with a copy of that head.

    Logits themselves would take a vocabulary's width for each position.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        architecture = find_architecture(model.config.model_type)
        self._head = copy.deepcopy(architecture.head(model))
        self._rows = cycle(list(decoder_outputs(model, architecture, windows)))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The next window's logits; windows come in the order they were recorded in, over and over."""
        with float32_arithmetic(self._head, self._head.weight.device):
            logits: torch.Tensor = self._head(next(self._rows).to(self._head.weight.device))
        return logits
