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
from larosa.decoding.loop import continue_prompt
from larosa.decoding.lossless import Expectation, Lookup, LosslessDecoder
from larosa.decoding.sampling import Proposal, Sampler, Sampling
from larosa.decoding.weights import DecoderWeights
from larosa.models import set_keep_counts
from larosa.sparsity import SiteSizes, keep_counts

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CONVERSIONS = {
    "dense": None,
    "none": {"rotation": "none"},
    "layer": {"rotation": "layer"},
    "int8 adapters": {"adapters": "int8", "rotation": "block"},
    "thresholds": {"rotation": "layer", "selection": "threshold"},
    "first token dense": {"dense_first_token": True},
    "few bits": {"weights": "int4"},
}
TOKENS = 110


@pytest.fixture
def make(make_model, quick_convert):
    def build(family, conversion="none", **overrides):
        model, options = make_model(family, **overrides), CONVERSIONS[conversion]
        return model if options is None else quick_convert(model, **options)

    return build


def draft_always(monkeypatch):
    """Draft whether it pays or not, as many as there is room for, in turns."""
    lengths = iter(range(1, 10**6))
    monkeypatch.setattr(Expectation, "best", lambda self, most: min(most, 1 + next(lengths) % 7))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("eager", [True, False])
def test_greedy_is_dense_decoding_token_for_token(make, token_ids, monkeypatch, family, conversion, eager):
    if eager:
        draft_always(monkeypatch)
    model, prompt = make(family, conversion), token_ids(1, 11)
    dense = Engine(DecoderWeights(model).whole(), 128)
    expected = list(continue_prompt(dense, prompt, TOKENS, Sampler()))
    decoder = LosslessDecoder(model, 128)
    assert list(decoder.continue_prompt(prompt, TOKENS, Sampler())) == expected
    found = decoder.verifications
    assert found.tokens == TOKENS - 1
    assert found.tokens == found.passes + found.accepted
    assert 0 <= found.accepted <= found.drafted
    if eager and conversion != "dense":
        assert found.drafted > found.passes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversion", ["none", "layer", "first token dense"])
def test_the_dense_pass_is_the_model_that_keeps_everything(make, token_ids, step_logits, family, conversion):
    """Other sums, for it reads columns and not rows: the same to rounding."""
    model, ids = make(family, conversion), token_ids(1, 40)
    found = step_logits(Engine(DecoderWeights(model).whole(), 40), ids, 11)
    architecture = find_architecture(model.config.model_type)
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), SiteSizes.of(model.config)))
    expected = step_logits(Engine(model, 40), ids, 11)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_draft_that_is_right_is_taken_whole(make, token_ids, monkeypatch):
    """With nearly everything kept the sparse pass is all but the dense one."""
    draft_always(monkeypatch)
    model = make("llama", "none")
    architecture, sizes = find_architecture("llama"), SiteSizes.of(model.config)
    set_keep_counts(model, architecture, keep_counts(0.02, PerSite(), sizes))
    decoder = LosslessDecoder(model, 128)
    list(decoder.continue_prompt(token_ids(1, 11), TOKENS, Sampler()))
    assert decoder.verifications.accepted > 0.8 * decoder.verifications.drafted
    assert decoder.verifications.to_dict()["tokens_per_pass"] > 1.5


def test_ties_go_to_the_same_token(make, token_ids, monkeypatch):
    """All logits of equal rows of the head are equal: the first of them wins, in lossless decoding too."""
    draft_always(monkeypatch)
    model = make("llama", "none", tie_word_embeddings=False)
    head = model.get_output_embeddings().weight
    head.data[1::2] = head.data[::2]
    prompt = token_ids(1, 11)
    expected = list(continue_prompt(Engine(DecoderWeights(model).whole(), 128), prompt, TOKENS, Sampler()))
    assert not any(token % 2 for token in expected)
    assert list(LosslessDecoder(model, 128).continue_prompt(prompt, TOKENS, Sampler())) == expected


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_repetition_penalty_and_end_tokens(make, token_ids, monkeypatch, penalty):
    draft_always(monkeypatch)
    model, prompt, sampling = make("qwen3"), token_ids(1, 11), Sampling(repetition_penalty=penalty)
    dense = Engine(DecoderWeights(model).whole(), 128)
    expected = list(continue_prompt(dense, prompt, TOKENS, Sampler(sampling)))
    decoder = LosslessDecoder(model, 128)
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


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.1)],
    ids=["all", "top_k", "top_p", "min_p"],
)
@pytest.mark.parametrize("certain", [False, True])
def test_what_is_accepted_has_the_distribution_of_the_logits(sampling, certain):
    """Two proposals from another distribution, or none: tokens are distributed as drawn from the logits one by one."""
    generator = torch.Generator().manual_seed(0)
    logits, proposed = 1.5 * torch.randn(2, 3, 8, generator=generator)
    sampler = Sampler(sampling)
    counts = torch.zeros(3, 8, dtype=torch.float64)
    for trial in range(4000):
        proposals = [sampler.propose(row[None]) for row in proposed[:2]]
        if certain:
            proposals = [Proposal(token % 8, None) for token in (trial, trial // 8)]
        for row, token in enumerate(sampler.accept(proposals, logits)):
            counts[row, token] += 1
    assert counts.sum(dim=1)[0] == 4000
    for row in range(3):
        wanted = sampler._probabilities(logits[row : row + 1])
        assert chi_square(counts[row], wanted) < 5, row


def test_sampled_texts_have_the_distribution_of_dense_ones(make, monkeypatch):
    """The pairs of tokens that follow a prompt, of three likely ones each, against all that the dense logits say."""
    draft_always(monkeypatch)
    model, prompt = make("llama", "none"), torch.tensor([[3, 100, 41]])
    decoder, engine = LosslessDecoder(model, 16), Engine(DecoderWeights(model).whole(), 16)
    sampler = Sampler(Sampling(1.5, top_k=3, seed=1))
    first = sampler._probabilities(engine.prefill(prompt))
    pairs = torch.zeros(len(first), len(first), dtype=torch.float64)
    for token in first.nonzero()[:, 0]:
        pairs[token] = first[token] * sampler._probabilities(engine.step(token[None], torch.tensor([3])))
    counts = torch.zeros_like(pairs)
    for _ in range(600):
        one, two, _ = decoder.continue_prompt(prompt, 3, sampler)
        counts[one, two] += 1
    assert decoder.verifications.accepted > 80
    assert decoder.verifications.drafted - decoder.verifications.accepted > 80
    assert chi_square(counts.flatten(), pairs.flatten()) < 5


def test_the_same_seed_gives_the_same_text(make, token_ids):
    model, prompt = make("qwen2"), token_ids(1, 5)
    texts = [
        list(LosslessDecoder(model, 64).continue_prompt(prompt, 50, Sampler(Sampling(0.9, seed=seed))))
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_lookup_finds_what_followed():
    text, lookup, sampler = [5, 6, 7, 8, 9, 6, 7], Lookup(), Sampler()
    assert lookup.most([5]) == 0
    assert lookup.most(text) == 4  # 8, 9, 6, 7
    assert [proposal.token for proposal in lookup.draft(text, 2, sampler)] == [8, 9]
    text += [1, 6, 7]
    assert [proposal.token for proposal in lookup.draft(text, 3, sampler)] == [1, 6, 7]
    text += [8, 9, 6]  # three tokens say more than two
    assert [proposal.token for proposal in lookup.draft(text, 2, sampler)] == [7, 1]
    text.append(100)
    assert lookup.most(text) == 0


def test_a_text_that_repeats_itself_is_looked_up(make):
    """A dense model drafts by the text alone, and greedy tiny models repeat themselves."""
    model = make("llama", "dense")
    decoder = LosslessDecoder(model, 128)
    list(decoder.continue_prompt(torch.tensor([[5, 6, 7] * 4]), TOKENS, Sampler()))
    assert decoder.verifications.accepted > 20


def test_what_does_not_pay_is_left_out():
    expected = Expectation(cost=0.6)
    assert expected.best(7) > 0
    for _ in range(60):
        expected.observe(1, 0)
    assert expected.best(7) == 0
    for _ in range(31):
        expected.observe(0, 0)
        assert expected.best(7) == 0
    expected.observe(0, 0)
    assert expected.best(7) == 1
    assert expected.best(0) == 0
    for _ in range(100):
        expected.observe(7, 7)
    assert expected.best(7) == 7
    assert expected.best(3) == 3


def test_text_and_options(make, tokenizer):
    model = make("llama", "none")
    result = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=40, lossless=True)
    assert result.lossless["passes"] + result.lossless["accepted"] == result.tokens - 1
    assert larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=1, lossless=True).lossless["passes"] == 0
    with pytest.raises(LarosaError, match="--lossless is of larosa's engine: use --engine larosa, not transformers"):
        larosa.generate(model, tokenizer, "w9", lossless=True, engine="transformers")


def test_weights_that_were_refit_are_refused(make_model, quick_convert):
    model = quick_convert(make_model("llama"), compensation="linear")
    with pytest.raises(LarosaError, match="--compensation linear has changed this model's weights"):
        LosslessDecoder(model, 32)


def test_logits_that_are_not_finite(make, token_ids):
    model = make("llama", "none")
    decoder, prompt = LosslessDecoder(model, 64), token_ids(1, 5)
    assert len(list(decoder.continue_prompt(prompt, 10, Sampler()))) == 10
    model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(LarosaError, match="NaN or Inf"):
        list(decoder.continue_prompt(prompt, 10, Sampler()))
