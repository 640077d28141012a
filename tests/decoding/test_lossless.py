"""Lossless decoding: the dense pass's text, token for token or in distribution, whatever the drafts are worth."""

from __future__ import annotations

import math

import pytest
import torch

import larosa
from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import PerSite
from larosa.decoding import Engine
from larosa.decoding.drafting import Lookup
from larosa.decoding.loop import continue_prompt
from larosa.decoding.lossless import LosslessDecoder, Speculation, Verifications
from larosa.decoding.pace import Acceptance, Pace
from larosa.decoding.sampling import Sampler, Sampling, candidates
from larosa.decoding.weights import DecoderWeights
from larosa.models import set_keep_counts
from larosa.runtime.session import Session
from larosa.sparsity import SiteSizes, keep_counts

from .conftest import LOSSLESS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
#: What is decoded, what drafts (None for what it skips, or for its text alone), and whether it drafts always.
CASES = [
    *((conversion, None, True) for conversion in LOSSLESS),
    ("dense", "int4", True),
    ("dense", "model", True),
    ("thresholds", "int8", True),
    ("dense", "int8", False),
    ("none", None, False),
]
TOKENS = 110


def draft_always(monkeypatch):
    """Draft whether it pays or not, as many as there is room for, in turns."""
    lengths = iter(range(1, 10**6))
    for name, value in {"known": True, "draft_seconds": 1.0}.items():
        monkeypatch.setattr(Pace, name, value)
    monkeypatch.setattr(Pace, "seconds", lambda self, rows: 1.0)

    def gains(self, acceptance, most, speed, **costs):
        turn = next(lengths)
        return [float(count) if turn % 5 else -1.0 for count in range(1, 1 + min(most, 1 + turn % 7))]

    monkeypatch.setattr(Pace, "gains", gains)


def dense_tokens(model, prompt, tokens=TOKENS, sampling=None):
    """Those of the dense pass alone: nothing drafts."""
    engine = Engine(DecoderWeights(model).whole(), 128)
    sampler = Sampler(sampling, device=engine.device)
    logits, found = engine.prefill(prompt), []
    sampler.start(prompt, logits.shape[-1])
    for at in range(prompt.shape[1], prompt.shape[1] + tokens):
        found += sampler.accept(logits)
        logits = engine.step(*torch.tensor([found[-1:], [at]], device=engine.device))
    return found


@pytest.mark.parametrize(
    ("family", "in_blocks"), [*((family, False) for family in FAMILIES), pytest.param("llama", True, id="in blocks")]
)
@pytest.mark.parametrize(("conversion", "draft", "eager"), CASES)
@pytest.mark.one_of(4)
def test_greedy_is_dense_decoding_token_for_token(
    make_lossless, make_draft, token_ids, monkeypatch, family, conversion, draft, eager, in_blocks
):
    if eager:
        draft_always(monkeypatch)
    model, prompt = make_lossless(family, conversion), token_ids(1, 11)
    dense = Engine(DecoderWeights(model).whole(), 128)
    expected = list(continue_prompt(dense, prompt, TOKENS, Sampler()))
    drafter = make_draft(family) if draft == "model" else draft
    decoder = LosslessDecoder(model, 128, draft=drafter, in_blocks=in_blocks)
    assert list(decoder.continue_prompt(prompt, TOKENS, Sampler())) == expected
    found = decoder.verifications
    assert found.tokens == TOKENS - 1
    assert found.tokens == found.passes + found.accepted
    assert 0 <= found.accepted <= found.drafted
    if eager and (conversion, draft) != ("dense", None):
        assert found.drafted > found.passes


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=5),
        Sampling(1.3, top_p=0.8, min_p=0.01),
        Sampling(1.0, repetition_penalty=1.3),
    ],
    ids=["all", "top_k", "top_p", "penalty"],
)
@pytest.mark.parametrize(("conversion", "draft"), [("none", None), ("dense", "int8")])
@pytest.mark.parametrize("in_blocks", [False, True], ids=["looking", "in blocks"])
def test_sampled_is_the_dense_pass_with_the_same_noise(
    make_lossless, token_ids, monkeypatch, sampling, conversion, draft, in_blocks
):
    """What is drafted, and how much, has no part in it."""
    draft_always(monkeypatch)
    model, prompt = make_lossless("qwen3", conversion), token_ids(1, 11)
    decoder = LosslessDecoder(model, 128, draft=draft, in_blocks=in_blocks)
    found = list(decoder.continue_prompt(prompt, TOKENS, Sampler(sampling)))
    assert found == dense_tokens(model, prompt, sampling=sampling)
    assert len(set(found)) > 3  # it does not stand still
    assert decoder.verifications.drafted > 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversion", ["none", "layer", "first token dense"])
def test_the_dense_pass_is_the_model_that_keeps_everything(make_lossless, token_ids, step_logits, family, conversion):
    """Other sums, for it reads columns and not rows: the same to rounding."""
    model, ids = make_lossless(family, conversion), token_ids(1, 40)
    found = step_logits(Engine(DecoderWeights(model).whole(), 40), ids, 11)
    architecture = find_architecture(model.config.model_type)
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), SiteSizes.of(model.config)))
    expected = step_logits(Engine(model, 40), ids, 11)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_draft_that_is_right_is_taken_whole(make_lossless, token_ids, monkeypatch):
    """With nearly everything kept the sparse pass is all but the dense one."""
    draft_always(monkeypatch)
    model = make_lossless("llama", "none")
    architecture, sizes = find_architecture("llama"), SiteSizes.of(model.config)
    set_keep_counts(model, architecture, keep_counts(0.02, PerSite(), sizes))
    decoder = LosslessDecoder(model, 128)
    list(decoder.continue_prompt(token_ids(1, 11), TOKENS, Sampler()))
    assert decoder.verifications.accepted > 0.8 * decoder.verifications.drafted
    assert decoder.verifications.to_dict()["tokens_per_pass"] > 1.5


def test_ties_go_to_the_same_token(make_lossless, token_ids, monkeypatch):
    """All logits of equal rows of the head are equal: the first of them wins, in lossless decoding too."""
    draft_always(monkeypatch)
    model = make_lossless("llama", "none", tie_word_embeddings=False)
    head = model.get_output_embeddings().weight
    head.data[1::2] = head.data[::2]
    prompt = token_ids(1, 11)
    expected = list(continue_prompt(Engine(DecoderWeights(model).whole(), 128), prompt, TOKENS, Sampler()))
    assert not any(token % 2 for token in expected)
    assert list(LosslessDecoder(model, 128).continue_prompt(prompt, TOKENS, Sampler())) == expected


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_repetition_penalty_and_end_tokens(make_lossless, token_ids, monkeypatch, penalty, in_blocks):
    draft_always(monkeypatch)
    model, prompt, sampling = make_lossless("qwen3"), token_ids(1, 11), Sampling(repetition_penalty=penalty)
    dense = Engine(DecoderWeights(model).whole(), 128)
    expected = list(continue_prompt(dense, prompt, TOKENS, Sampler(sampling)))
    decoder = LosslessDecoder(model, 128, in_blocks=in_blocks)
    assert list(decoder.continue_prompt(prompt, TOKENS, Sampler(sampling))) == expected
    stop = {expected[40]}
    ended = list(decoder.continue_prompt(prompt, TOKENS, Sampler(sampling), stop))
    assert ended == expected[: 1 + expected.index(expected[40])]


def chi_square(counts, probabilities):
    """How many standard deviations Pearson's statistic is above its mean, over what can be drawn at all."""
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = counts.sum() * probabilities[possible]
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    return (statistic - degrees) / math.sqrt(2 * max(degrees, 1))


def probabilities(logits, sampling):
    """[vocabulary] float64 for logits [1, vocabulary]."""
    weights, tokens = candidates(logits, sampling)
    weights = weights[0].double() / weights.double().sum()
    whole = torch.zeros(logits.shape[-1], dtype=torch.float64)
    return weights if tokens is None else whole.scatter_(0, tokens[0], weights)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(1.0), id="all", marks=pytest.mark.slow),
        pytest.param(Sampling(0.7, top_k=5), id="top_k"),
        pytest.param(Sampling(1.3, top_p=0.8), id="top_p", marks=pytest.mark.slow),
        pytest.param(Sampling(1.0, min_p=0.1), id="min_p", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("at_once", [False, True], ids=["looking", "at once"])
def test_tokens_have_the_distribution_of_their_logits(sampling, at_once):
    """Whatever is proposed; and a proposal from much the same logits is mostly what is drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(3, 8, generator=generator)
    proposed = logits + 0.1 * torch.randn(3, 8, generator=generator)
    sampler = Sampler(sampling)
    counts, right = torch.zeros(3, 8, dtype=torch.float64), 0
    for _ in range(2000):
        proposals = torch.cat([sampler.propose(row[None], ahead) for ahead, row in enumerate(proposed[:2])])
        accepted = sampler.accept(logits, proposals, at_once=at_once)
        right += len(accepted) > 1
        for row, token in enumerate(accepted):
            counts[row, token] += 1
    assert counts.sum(dim=1)[0] == 2000
    assert right > 0.85 * 2000
    for row in range(3):
        assert chi_square(counts[row], probabilities(logits[row : row + 1], sampling)) < 5, row


def test_sampled_texts_have_the_distribution_of_dense_ones(make_lossless, monkeypatch):
    """The pairs of tokens that follow a prompt, of three likely ones each, against all that the dense logits say."""
    draft_always(monkeypatch)
    model, prompt = make_lossless("llama", "none"), torch.tensor([[3, 100, 41]])
    decoder, engine = LosslessDecoder(model, 16), Engine(DecoderWeights(model).whole(), 16)
    sampling = Sampling(1.5, top_k=3, seed=1)
    sampler = Sampler(sampling)
    first = probabilities(engine.prefill(prompt), sampling)
    pairs = torch.zeros(len(first), len(first), dtype=torch.float64)
    for token in first.nonzero()[:, 0]:
        pairs[token] = first[token] * probabilities(engine.step(token[None], torch.tensor([3])), sampling)
    counts = torch.zeros_like(pairs)
    for _ in range(600):
        one, two, _ = decoder.continue_prompt(prompt, 3, sampler)
        counts[one, two] += 1
    assert decoder.verifications.accepted > 80
    assert decoder.verifications.drafted - decoder.verifications.accepted > 80
    assert chi_square(counts.flatten(), pairs.flatten()) < 5


def test_the_same_seed_gives_the_same_text(make_lossless, token_ids):
    model, prompt = make_lossless("qwen2"), token_ids(1, 5)
    texts = [
        list(LosslessDecoder(model, 64).continue_prompt(prompt, 50, Sampler(Sampling(0.9, seed=seed))))
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_lookup_finds_what_followed():
    text, lookup = [5, 6, 7, 8, 9, 6, 7], Lookup(Pace(), Acceptance())
    assert lookup.following([5]) is None
    assert lookup.following(text) == 3  # 8, 9, 6, 7
    text += [1, 6, 7]
    assert lookup.following(text) == 7
    text += [8, 9, 6]  # three tokens say more than two
    assert lookup.following(text) == 6
    text.append(100)
    assert lookup.following(text) is None


def test_a_text_that_repeats_itself_is_looked_up(make_lossless, monkeypatch):
    """A dense model drafts by the text alone, and greedy tiny models repeat themselves. Rows cost nothing here."""
    monkeypatch.setattr(Pace, "known", True)
    monkeypatch.setattr(Pace, "seconds", lambda self, rows: 1.0)
    model = make_lossless("llama", "dense")
    decoder = LosslessDecoder(model, 128)
    list(decoder.continue_prompt(torch.tensor([[5, 6, 7] * 4]), TOKENS, Sampler()))
    assert decoder.verifications.accepted > 20


@pytest.mark.parametrize("in_blocks", [False, True])
def test_where_nothing_pays_one_token_is_drafted_now_and_then(make_lossless, token_ids, monkeypatch, in_blocks):
    model, prompt = make_lossless("llama", "none"), token_ids(1, 11)
    monkeypatch.setattr(Pace, "gains", lambda self, acceptance, most, speed, **costs: [-1.0] * most)
    monkeypatch.setattr(Pace, "speed", lambda self, acceptance: 0.0)
    decoder = LosslessDecoder(model, 128, in_blocks=in_blocks)
    list(decoder.continue_prompt(prompt, TOKENS, Sampler()))
    found = decoder.verifications
    assert found.drafted == 1
    assert found.tokens == found.passes + found.accepted == TOKENS - 1
    assert found.checked == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, repetition_penalty=1.3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("eager", [False, True])
def test_texts_in_turns_that_go_on_by_plain_steps_in_between(make_lossless, token_ids, monkeypatch, sampling, eager):
    """A token that was drawn ahead of the host is drawn again where another step came first."""
    if eager:
        draft_always(monkeypatch)
    model = make_lossless("llama", "none")
    engine = Engine(DecoderWeights(model).whole(), 128, texts=2)
    speculation = Speculation(engine, DecoderWeights(model), in_blocks=True)
    prompts = [token_ids(1, length, seed=length) for length in (5, 9)]
    sessions = [Session(engine, speculation.steps, text, speculation) for text in range(2)]
    samplers, texts = [Sampler(sampling) for _ in prompts], [[], []]
    for session, prompt, sampler, text in zip(sessions, prompts, samplers, texts, strict=True):
        logits = session.prefill(prompt[0].tolist())
        sampler.start(prompt, logits.shape[-1])
        text += sampler.accept(logits)
    for turn in range(60):
        for number, (session, sampler, text) in enumerate(zip(sessions, samplers, texts, strict=True)):
            if turn % (3 + number) == 2:
                text += sampler.accept(session.step(text[-1]))
            for _ in range(turn % 4):
                if len(text) < 80:
                    text += session.step_drafted(text[-1], 80 - len(text), sampler)[0]
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) >= 80
        assert text[:80] == dense_tokens(model, prompt, 80, sampling)


def test_drafts_are_counted_by_place():
    found = Verifications()
    found.count(passes=1, drafted=3, tokens=2, by_model=True)  # the second was wrong
    found.count(passes=1, drafted=3, tokens=4, by_model=True)
    found.count(passes=1, drafted=2, tokens=3, by_model=False)
    found.count(passes=4, drafted=0, tokens=4, by_model=False)
    assert found.accepted_at() == [1, 0.5, 1]
    assert (found.passes, found.drafted, found.accepted, found.tokens) == (7, 8, 6, 13)
    both = Verifications()
    both.add(found)
    both.add(found)
    assert (both.tokens, both.checked, both.right) == (26, [4, 4, 2, 0, 0, 0, 0], [4, 2, 2, 0, 0, 0, 0])


def test_text_and_options(make_lossless, tokenizer):
    model = make_lossless("llama", "none")
    result = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=40, lossless=True)
    assert result.lossless["passes"] + result.lossless["accepted"] == result.tokens - 1
    assert larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=1, lossless=True).lossless["passes"] == 0
    with pytest.raises(LarosaError, match="--lossless is of larosa's engine: use --engine larosa, not transformers"):
        larosa.generate(model, tokenizer, "w9", lossless=True, engine="transformers")
    with pytest.raises(LarosaError, match="--draft says what drafts for --lossless: add that"):
        larosa.generate(model, tokenizer, "w9", draft="int8")


def test_drafters_that_do_not_belong(make_lossless, make_model):
    dense = make_model("llama")
    with pytest.raises(LarosaError, match="unknown draft 'int3': one of int8, int4"):
        LosslessDecoder(dense, 32, draft="int3")
    with pytest.raises(LarosaError, match=r"a model of 2 layers.*cannot draft for a model of 3 layers"):
        LosslessDecoder(dense, 32, draft=make_model("llama", num_hidden_layers=2))
    with pytest.raises(LarosaError, match="in bfloat16, where the other is in float32: give a --dtype"):
        LosslessDecoder(dense, 32, draft=make_model("llama", torch.bfloat16))


def test_values_in_another_basis_are_not_shared(make_model, quick_convert):
    dense, rotated = make_model("llama"), quick_convert(make_model("llama"), value_rotation=True)
    with pytest.raises(LarosaError, match=r"--draft has its values rotated.*--no-value-rotation"):
        LosslessDecoder(dense, 32, draft=rotated)
    with pytest.raises(LarosaError, match="the model has its values rotated"):
        LosslessDecoder(rotated, 32, draft=dense)


def test_weights_that_were_refit_are_refused(make_model, quick_convert):
    model = quick_convert(make_model("llama"), compensation="linear")
    with pytest.raises(LarosaError, match="--compensation linear has changed this model's weights"):
        LosslessDecoder(model, 32)


def test_logits_that_are_not_finite(make_lossless, token_ids):
    model = make_lossless("llama", "none")
    decoder, prompt = LosslessDecoder(model, 64), token_ids(1, 5)
    assert len(list(decoder.continue_prompt(prompt, 10, Sampler()))) == 10
    model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(LarosaError, match="NaN or Inf"):
        list(decoder.continue_prompt(prompt, 10, Sampler()))
