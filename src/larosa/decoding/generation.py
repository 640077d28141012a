"""Generate text from a dense or converted model, streamed and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

import torch

from larosa.architectures.context import context_length
from larosa.data.text import tokenize
from larosa.decoding.chat import Messages, render, special_tokens, turn_ends
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.engine import Engine
from larosa.decoding.forward import ForwardEngine
from larosa.decoding.loop import StepEngine, continue_prompt, stop_tokens
from larosa.decoding.lossless import DRAFT_ALONE, LosslessDecoder
from larosa.decoding.sampling import Sampler, Sampling
from larosa.decoding.text import TextStream
from larosa.errors import LarosaError, choose
from larosa.formats import CacheDtype
from larosa.ops.schema import has_kernels


class EngineName(StrEnum):
    """What runs the model: larosa's own engine, or transformers' forward, which reads every weight."""

    LAROSA = "larosa"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Generation:
    """Generated text and how fast it came.

    `text` is what follows the prompt, its leading space included. `finish_reason` is `stop` after an end token or a
    stop string, else `length`. `tokens_per_second` is of decoding alone: the tokens after the first over the time after
    the first. None where fewer than two tokens were generated.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: Literal["stop", "length"]
    seconds: float
    tokens_per_second: float | None
    engine: str
    kv_cache_dtype: str
    lossless: dict[str, float | None] | None = None  # `Verifications`

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages,
    *,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    engine: str | None = None,
    kv_cache_dtype: str = CacheDtype.AUTO,
    lossless: bool = False,
    draft: Any = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt, or answer the last message of a conversation.

    Args:
        prompt: text to continue, or messages, which become a prompt by the tokenizer's chat template.
        max_new_tokens: stop after so many tokens, or earlier at an end-of-sequence token.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; None for what the checkpoint's generation
            settings say (`Sampling.of`), greedy for want of any.
        seed: the same seed gives the same text on the same device and engine.
        stop: strings that end the text; they may span tokens, and are not in it.
        engine: `larosa`, `transformers`, or None for larosa's where the device has its kernels.
        kv_cache_dtype: how larosa's engine keeps keys and values: `auto` as the model's weights, or `int8`.
        lossless: give the text of the model with nothing skipped, of which something cheaper drafts some tokens at a
            time; see `LosslessDecoder`.
        draft: what that is: `int8`, `int4`, or another model; see `larosa.decoding.lossless.draft_weights`.
        on_text: called with each piece of text as soon as it is complete.

    Raises:
        LarosaError: a bad option, a prompt that does not fit the model's context, a conversation without a chat
            template, a model that the engine does not run, or logits that are NaN or Inf.
    """
    if max_new_tokens < 1:
        raise LarosaError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    sampling = Sampling.of(
        model.generation_config,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    strings = stop_strings(model, stop)
    device = model.get_input_embeddings().weight.device
    chosen = _engine(engine, device)
    cache_dtype = _cache_dtype(kv_cache_dtype, chosen)
    if lossless and chosen is not EngineName.LAROSA:
        raise LarosaError(f"--lossless is of larosa's engine: use --engine larosa, not {chosen}")
    if draft is not None and not lossless:
        raise LarosaError(DRAFT_ALONE)
    ids = prompt_ids(model, tokenizer, prompt)
    context = context_length(model.config)
    if len(ids) + max_new_tokens > context:
        raise LarosaError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context of {context}"
        )
    ends = stop_tokens(model) | special_tokens(tokenizer, strings)
    if not isinstance(prompt, str):
        ends |= turn_ends(tokenizer)
    output = TextStream(tokenizer, ids.tolist(), on_text, strings)
    started = time.perf_counter()
    length = len(ids) + max_new_tokens
    sampler = Sampler(sampling, device=device, kernels=chosen is EngineName.LAROSA and device.type != "cpu")
    decoder: LosslessDecoder | None = None
    if lossless:
        decoder = LosslessDecoder(model, length, cache_dtype, draft)
        tokens = decoder.continue_prompt(ids[None], max_new_tokens, sampler, ends)
    else:
        runner: StepEngine = Engine(model, length, cache_dtype) if chosen is EngineName.LAROSA else ForwardEngine(model)
        if isinstance(runner, Engine) and device.type == "cuda":
            tokens = GraphLoop(runner, sampler).continue_prompt(ids[None], max_new_tokens, ends)
        else:
            tokens = continue_prompt(runner, ids[None], max_new_tokens, sampler, ends)
    for token in tokens:
        output.put(token)
        if output.stopped:
            break
    output.end()
    return Generation(
        text=output.text,
        prompt_tokens=len(ids),
        tokens=output.tokens,
        finish_reason="stop" if output.stopped or token in ends else "length",
        seconds=time.perf_counter() - started,
        tokens_per_second=output.tokens_per_second,
        engine=chosen.value,
        kv_cache_dtype=cache_dtype.value,
        lossless=None if decoder is None else decoder.verifications.to_dict(),
    )


def prompt_ids(model: Any, tokenizer: Any, prompt: str | Messages) -> torch.Tensor:
    """A prompt's tokens [length] int64; for an empty text the beginning-of-sequence token.

    Raises:
        LarosaError: it is no Unicode text, there is no such token, or there is no chat template for messages.
    """
    if isinstance(prompt, str):
        ids = tokenize(prompt, tokenizer, model.config.vocab_size)
    else:
        ids = tokenize(render(tokenizer, prompt), tokenizer, model.config.vocab_size, special=False)
    if len(ids) > 0:
        return ids
    if model.config.bos_token_id is None:
        raise LarosaError("the prompt is empty and the model has no beginning-of-sequence token")
    return torch.tensor([model.config.bos_token_id])


def stop_strings(model: Any, given: Sequence[str]) -> list[str]:
    """Those that are given, and the checkpoint's own by `model.generation_config`.

    Raises:
        LarosaError: one is empty.
    """
    if "" in given:
        raise LarosaError("--stop must not be empty")
    own = getattr(model.generation_config, "stop_strings", None) or []
    return [*given, *([own] if isinstance(own, str) else own)]


def _engine(name: str | None, device: torch.device) -> EngineName:
    if name is None:
        return EngineName.LAROSA if has_kernels(device.type) else EngineName.TRANSFORMERS
    return choose(EngineName, name, "engine")


def _cache_dtype(name: str, engine: EngineName) -> CacheDtype:
    dtype = CacheDtype.parse(name)
    if dtype is not CacheDtype.AUTO and engine is not EngineName.LAROSA:
        raise LarosaError(f"--kv-cache-dtype {dtype} is of larosa's engine: use --engine larosa, not {engine}")
    return dtype
