"""Lossless decoding on a GPU: the tokens of the engine dense, from captured steps that nobody waits for one by one."""

from __future__ import annotations

import pytest
import torch

import larosa
from larosa import LarosaError
from larosa.decoding import Engine
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.lossless import LosslessDecoder
from larosa.decoding.sampling import Sampler, Sampling
from larosa.decoding.weights import DecoderWeights
from larosa.runtime.continuation import Request

from .test_lossless import FAMILIES, TOKENS, dense_tokens, draft_always

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
#: What is decoded, what drafts (None for what it skips, or for its text alone), and whether it drafts always.
CASES = [
    ("dense", None, False),
    ("dense", "int8", True),
    ("dense", "int4", True),
    ("dense", "int4", False),
    ("dense", "model", True),
    ("none", None, True),
    ("layer", None, True),
    ("thresholds", None, True),
    ("thresholds", "int4", True),
    ("few bits", None, True),
]
#: Of those, what the other families' own parts could get in the way of.
OTHERS = [("dense", None, False), ("dense", "int4", True), ("thresholds", None, True)]


@pytest.fixture
def prompts(token_ids):
    return [token_ids(1, length, seed=length) for length in (3, 11, 17)]


@pytest.mark.parametrize(
    ("family", "dtype", "conversion", "draft", "eager"),
    [("llama", dtype, *case) for dtype in (torch.float32, torch.bfloat16) for case in CASES]
    + [(family, torch.bfloat16, *case) for family in FAMILIES[1:] for case in OTHERS],
)
def test_greedy_is_the_engine_dense(
    make_lossless,
    make_draft,
    prompts,
    monkeypatch,
    family,
    conversion,
    draft,
    eager,
    dtype,
):
    if eager:
        draft_always(monkeypatch)
    model = make_lossless(family, conversion, head_dim=16).to(DEVICE, dtype)
    drafter = make_draft(family, head_dim=16).to(DEVICE, dtype) if draft == "model" else draft
    dense = GraphLoop(Engine(DecoderWeights(model).whole(), 128), Sampler(device=DEVICE, kernels=True))
    decoder = LosslessDecoder(model, 128, draft=drafter)
    for prompt in prompts:
        expected = list(dense.continue_prompt(prompt, TOKENS))
        assert list(decoder.continue_prompt(prompt, TOKENS, Sampler(device=DEVICE, kernels=True))) == expected
    found = decoder.verifications
    assert found.tokens == found.passes + found.accepted == len(prompts) * (TOKENS - 1)
    if eager:
        assert found.drafted > found.passes
        assert sum(found.checked) > 50


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=5),
        Sampling(1.3, top_p=0.8, min_p=0.01),
        Sampling(1.0, repetition_penalty=1.3),
        Sampling(repetition_penalty=1.3),
    ],
    ids=["all", "top_k", "top_p", "penalty", "greedy penalty"],
)
@pytest.mark.parametrize(("conversion", "draft"), [("thresholds", None), ("dense", "int8")])
def test_sampled_is_the_dense_pass_with_the_same_noise(
    make_lossless,
    prompts,
    monkeypatch,
    sampling,
    conversion,
    draft,
):
    draft_always(monkeypatch)
    model = make_lossless("qwen3", conversion).to(DEVICE)
    decoder = LosslessDecoder(model, 128, draft=draft)
    for prompt in prompts:
        found = list(decoder.continue_prompt(prompt, TOKENS, Sampler(sampling, device=DEVICE, kernels=True)))
        assert found == dense_tokens(model, prompt, sampling=sampling)
    assert decoder.verifications.accepted > 20


def test_texts_of_one_engine(make_lossless, tokenizer):
    """Each has its own place in the cache, which one graph for all of them finds."""
    model = make_lossless("llama", "thresholds").to(DEVICE)
    llm = larosa.LLM(model, tokenizer, 100, lossless=True, draft="int8")
    sessions = llm.sessions(3)
    for number, session in enumerate(reversed(sessions)):
        prompt = [5 + number, 6, 7, 8]
        events = llm.stream(Request(prompt, 60), session)
        tokens = [event.token for event in events]
        assert tokens == dense_tokens(model, torch.tensor([prompt]), len(tokens))


def test_end_tokens_and_the_end_of_the_cache(make_lossless, token_ids):
    model, prompt = make_lossless("llama", "thresholds").to(DEVICE), token_ids(1, 5)
    decoder, sampler = LosslessDecoder(model, 45), Sampler(device=DEVICE, kernels=True)
    tokens = list(decoder.continue_prompt(prompt, 40, sampler))
    assert tokens == dense_tokens(model, prompt, 40)
    first = tokens.index(tokens[20])
    assert list(decoder.continue_prompt(prompt, 40, sampler, {tokens[20]})) == tokens[: first + 1]
    short = LosslessDecoder(model, 7)  # has not room for a step of eight rows
    assert list(short.continue_prompt(prompt, 2, sampler)) == tokens[:2]


def test_a_drafter_elsewhere(make_model):
    with pytest.raises(LarosaError, match="--draft: a model on cpu, where the other is on cuda:0"):
        LosslessDecoder(make_model("llama").to(DEVICE), 32, draft=make_model("llama"))


def test_logits_that_are_not_finite(make_lossless, token_ids):
    model = make_lossless("llama", "thresholds").to(DEVICE)
    model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(LarosaError, match="NaN or Inf"):
        list(LosslessDecoder(model, 32).continue_prompt(token_ids(1, 5), 10, Sampler(device=DEVICE, kernels=True)))


def test_logits_that_become_nan_on_the_way(make_lossless, token_ids):
    """The prompt is sound, and a later token's embedding is not."""
    model, prompt = make_lossless("llama", "dense").to(DEVICE), token_ids(1, 5)
    tokens = dense_tokens(model, prompt, 20)
    model.get_input_embeddings().weight.data[tokens[6]] = float("nan")
    decoder, found = LosslessDecoder(model, 64, draft="int8"), []
    with pytest.raises(LarosaError, match="NaN or Inf"):
        found.extend(decoder.continue_prompt(prompt, 20, Sampler(device=DEVICE, kernels=True)))
    assert found == tokens[: len(found)]
