from __future__ import annotations

import pytest
import torch

from larosa import LarosaError
from larosa.decoding.sampling import Sampler
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
    torch.testing.assert_close(frequencies(Sampler(temperature), LOGITS), expected, rtol=0, atol=0.015)


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
    found = frequencies(Sampler(1.0, top_p), LOGITS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)
    assert bool((found[expected == 0] == 0).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_drawn(temperature):
    found = frequencies(Sampler(temperature, banned=(1, 3)), LOGITS)
    assert found[1] == found[3] == 0
    assert found.argmax() == 5


def test_follows_its_seed_alone():
    def draw(seed):
        sampler = Sampler(1.0, 0.9, seed)
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
    tokens = Sampler(temperature, banned=banned)(logits).tolist()
    assert tokens[1] == NO_TOKEN
    assert NO_TOKEN not in (tokens[0], tokens[2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_huge_logits(temperature):
    assert Sampler(temperature)(torch.tensor([[-3e38, 3e38, 0.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"top_p": float("nan")}, "--top-p"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(LarosaError, match=message):
        Sampler(**options)


@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_top_p_of_a_large_vocabulary(top_p):
    """Tokens that cannot be in the set are left out before it is ranked: the set is that of a full ranking."""
    logits = 4 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    ranked, order = torch.softmax(logits[0].double(), -1).sort(descending=True)
    size = int((ranked.cumsum(0) < top_p).sum()) + 1
    drawn = Sampler(1.0, top_p)(logits.expand(20_000, -1))
    assert set(drawn.tolist()) <= set(order[:size].tolist())
    share = float((drawn == order[0]).float().mean())
    assert share == pytest.approx(float(ranked[0] / ranked[:size].sum()), abs=0.02)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers(monkeypatch, number):
    """Tokens without probability are not drawn at either end."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, number, dtype=torch.float64))
    drawn = Sampler(1.0, banned=(0, 5))(torch.tensor([[9.0, 1.0, 2.0, 1.0, 3.0, 9.0]]))
    assert drawn.tolist() == [1 if number == 0 else 4]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_kernels_draw_what_pytorch_draws(monkeypatch, temperature):
    monkeypatch.setattr(torch.ops.larosa, "greedy", greedy_reference)
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[2, 7], logits[4, 9] = torch.nan, torch.inf
    tokens = Sampler(temperature, seed=3, kernels=True)(logits)
    assert torch.equal(tokens, Sampler(temperature, seed=3)(logits))
    assert (tokens == NO_TOKEN).nonzero().flatten().tolist() == [2, 4]
