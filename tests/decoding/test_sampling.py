from __future__ import annotations

import math
import re
from dataclasses import asdict

import pytest
import torch
from transformers import GenerationConfig, TopKLogitsWarper

from larosa import LarosaError
from larosa.decoding.sampling import Sampler, Sampling, candidates, unused_settings
from larosa.ops.greedy import NO_TOKEN, greedy_reference

LOGITS = torch.tensor([[1.0, 3.0, -2.0, 2.5, 0.0, 2.0]])


def frequencies(sampler, logits, draws=20_000):
    tokens = sampler(logits.expand(draws, -1))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


def test_greedy_takes_the_likeliest():
    assert Sampler()(LOGITS).tolist() == [1]


def test_greedy_takes_the_first_of_equals():
    assert Sampler()(torch.tensor([[0.0, 2.0, 2.0]])).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature):
    expected = torch.softmax(LOGITS[0] / temperature, -1)
    torch.testing.assert_close(frequencies(Sampler(Sampling(temperature)), LOGITS), expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.7, 0.9, 0.99])
def test_top_p_is_the_smallest_set_with_that_probability(top_p):
    probabilities = torch.softmax(LOGITS[0], -1).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(6), key=lambda i: -probabilities[i]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    expected = torch.tensor([probabilities[i] / mass if i in kept else 0.0 for i in range(6)])
    found = frequencies(Sampler(Sampling(1.0, top_p=top_p)), LOGITS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)
    assert bool((found[expected == 0] == 0).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_drawn(temperature):
    found = frequencies(Sampler(Sampling(temperature), banned=(1, 3)), LOGITS)
    assert found[1] == found[3] == 0
    assert found.argmax() == 5


def test_follows_its_seed_alone():
    def draw(seed):
        sampler = Sampler(Sampling(1.0, top_p=0.9, seed=seed))
        return [sampler(LOGITS).item() for _ in range(50)]

    torch.manual_seed(1)
    first, state = draw(4), torch.get_rng_state()
    torch.manual_seed(2)
    assert draw(4) == first
    assert draw(5) != first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("banned", [(), (2,)])
def test_unusable_logits_give_no_token(temperature, bad, banned):
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = bad
    tokens = Sampler(Sampling(temperature), banned=banned)(logits).tolist()
    assert tokens[1] == NO_TOKEN
    assert NO_TOKEN not in (tokens[0], tokens[2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_huge_logits(temperature):
    assert Sampler(Sampling(temperature))(torch.tensor([[-3e38, 3e38, 0.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1.0, math.nan, math.inf, "1", None)),
        *(("top_k", value) for value in (-1, 1.5, math.nan, math.inf, True)),
        *(("top_p", value) for value in (0.0, 1.1, -0.5, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("seed", value) for value in (2**64, -(2**63) - 1, 0.5)),
    ],
)
def test_bad_options(name, value):
    with pytest.raises(LarosaError, match=f"^{name} must be .*, not {re.escape(repr(value))}$"):
        Sampling(**{name: value})


def probabilities(sampler, sampling, logits):
    weights, tokens = candidates(sampler.changed(logits), sampling)
    if tokens is not None:
        weights = torch.zeros_like(logits).scatter(1, tokens, weights)
    return weights / weights.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.6},
        {"temperature": 1.8, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
        {"temperature": 0.7, "top_k": 1, "top_p": 0.01},
    ],
    ids=str,
)
def test_keeps_what_transformers_keeps(make_model, token_ids, options):
    """The same tokens with the same probabilities as `model.generate` draws from."""
    model, prompts = make_model("llama"), token_ids(8, 40)
    sampling = Sampling(**{"temperature": 1.0, **options})
    settings = {k: v for k, v in asdict(sampling).items() if k != "seed"}
    outputs = model.generate(
        prompts, max_new_tokens=1, do_sample=True, output_scores=True, return_dict_in_generate=True, **settings
    )
    expected = torch.softmax(outputs.scores[0], dim=-1)
    sampler = Sampler(sampling)
    sampler.start(prompts, expected.shape[1])
    found = probabilities(sampler, sampling, model(prompts).logits[:, -1])
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.3}, {}),
        ({"do_sample": True}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01}, {}),
        ({"do_sample": True, "top_k": 0}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 1.3, "top_p": 0.5}),
        ({"do_sample": True, "repetition_penalty": 1.3}, {"repetition_penalty": 1.0, "top_k": 5}),
    ],
    ids=str,
)
def test_takes_from_a_checkpoint_what_transformers_takes(make_model, token_ids, settings, given):
    model, prompts = make_model("llama"), token_ids(8, 30)
    model.generation_config.update(**settings)
    outputs = model.generate(prompts, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **given)
    sampling = Sampling.of(model.generation_config, seed=3, **given)
    assert sampling.seed == 3
    sampler = Sampler(sampling)
    sampler.start(prompts, 128)
    logits = model(prompts).logits[:, -1]
    if not settings.get("do_sample"):
        assert torch.equal(sampler(logits), outputs.sequences[:, -1])
    else:
        expected = torch.softmax(outputs.scores[0], dim=-1)
        torch.testing.assert_close(probabilities(sampler, sampling, logits), expected, rtol=1e-3, atol=1e-6)


def test_what_a_greedy_checkpoint_says_applies_once_there_is_a_temperature():
    config = GenerationConfig(temperature=0.6, top_p=0.9)
    assert Sampling.of(config) == Sampling(0.0, top_p=0.9)
    assert Sampling.of(config, temperature=1.0, top_p=None) == Sampling(1.0, top_p=0.9)
    assert Sampling.of(GenerationConfig(), temperature=1.0) == Sampling(1.0)


def test_bad_settings_of_a_checkpoint_are_its_files():
    config = GenerationConfig()
    config.top_p = 1.5
    with pytest.raises(LarosaError, match=r"^generation_config.json: top_p must be in \(0, 1\], not 1.5$"):
        Sampling.of(config)
    assert Sampling.of(config, top_p=0.5).top_p == 0.5
    with pytest.raises(LarosaError, match="min_p must be in"):
        Sampling.of(GenerationConfig(), min_p=2.0)


def test_settings_that_have_no_effect_here():
    assert unused_settings(GenerationConfig()) == []
    assert unused_settings(GenerationConfig(do_sample=True, top_k=5, num_beams=1, typical_p=1.0)) == []
    config = GenerationConfig(num_beams=4, no_repeat_ngram_size=2, bad_words_ids=[[5]])
    assert unused_settings(config) == ["num_beams", "no_repeat_ngram_size", "bad_words_ids"]


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_top_k_keeps_what_is_as_likely_as_the_last(top_k):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 0.0]])
    sampling = Sampling(1.0, top_k)
    expected = torch.softmax(TopKLogitsWarper(top_k)(None, logits), dim=-1)
    torch.testing.assert_close(probabilities(Sampler(sampling), sampling, logits), expected)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_penalty_follows_the_text(make_model, token_ids, temperature):
    """The prompt's tokens and all that were drawn count, and a new text begins without them."""
    model, prompts = make_model("llama"), [token_ids(2, 5, seed=seed) for seed in (1, 2)]
    sampler = Sampler(Sampling(temperature, top_k=1, repetition_penalty=1.8))
    for ids in prompts:
        expected = model.generate(
            ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, repetition_penalty=1.8, eos_token_id=127
        )
        sampler.start(ids, 128)
        while ids.shape[1] < expected.shape[1]:
            logits = model(ids).logits[:, -1]
            logits[:, 127] = -torch.inf  # as min_new_tokens does
            ids = torch.cat([ids, sampler(logits)[:, None]], dim=1)
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e300])
def test_extreme_settings_draw_some_token(penalty, temperature):
    sampler = Sampler(Sampling(temperature, 3, 0.9, 0.1, penalty))
    sampler.start(torch.tensor([[1, 2]]), 6)
    drawn = sampler(LOGITS).item()
    if penalty > 1:
        assert drawn in (3, 5) or temperature > 1
    elif temperature < 1:
        assert drawn == 1


def test_a_ban_outlasts_the_penalty():
    sampler = Sampler(Sampling(1.0, repetition_penalty=1e-30), banned=(1,))
    sampler.start(torch.tensor([[1, 2]]), 6)
    assert 1 not in sampler(LOGITS.expand(1, -1)).tolist()


@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_top_p_of_a_large_vocabulary(top_p):
    """Tokens that cannot be in the set are left out before it is ranked: the set is that of a full ranking."""
    logits = 4 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    ranked, order = torch.softmax(logits[0].double(), -1).sort(descending=True)
    size = int((ranked.cumsum(0) < top_p).sum()) + 1
    drawn = Sampler(Sampling(1.0, top_p=top_p))(logits.expand(10_000, -1))
    assert set(drawn.tolist()) <= set(order[:size].tolist())
    share = float((drawn == order[0]).float().mean())
    assert share == pytest.approx(float(ranked[0] / ranked[:size].sum()), abs=0.02)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers(monkeypatch, number):
    """Tokens without probability are not drawn at either end."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, number, dtype=torch.float64))
    drawn = Sampler(Sampling(1.0), banned=(0, 5))(torch.tensor([[9.0, 1.0, 2.0, 1.0, 3.0, 9.0]]))
    assert drawn.tolist() == [1 if number == 0 else 4]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_kernels_draw_what_pytorch_draws(monkeypatch, temperature):
    monkeypatch.setattr(torch.ops.larosa, "greedy", greedy_reference)
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[2, 7], logits[4, 9] = torch.nan, torch.inf
    tokens = Sampler(Sampling(temperature, seed=3), kernels=True)(logits)
    assert torch.equal(tokens, Sampler(Sampling(temperature, seed=3))(logits))
    assert (tokens == NO_TOKEN).nonzero().flatten().tolist() == [2, 4]
