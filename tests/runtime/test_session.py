"""Sessions: what a session gives is what a new one gives, to the bit, whatever it held before."""

from __future__ import annotations

import pytest
import torch

from larosa import LarosaError
from larosa.decoding import Engine
from larosa.decoding.steps import PlainSteps
from larosa.decoding.weights import DecoderWeights
from larosa.runtime import session as session_module
from larosa.runtime.session import Session

PIECE = 8
LENGTH = 64
CONVERSIONS = {
    "dense": None,
    "sparse": {},
    "first token dense": {"dense_first_token": True},
    "prompts dense": {"prefill": "dense"},
    "thresholds": {"method": "teal"},
}


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(session_module, "PIECE", PIECE)


@pytest.fixture
def make(make_model, quick_convert):
    def build(family="llama", conversion="first token dense", **overrides):
        model, options = make_model(family, **overrides), CONVERSIONS[conversion]
        return model if options is None else quick_convert(model, **options)

    return build


@pytest.fixture
def weights(make):
    return DecoderWeights(make())


def run(session, prompt, steps=6):
    """The logits after a prompt, and after each of some likeliest tokens."""
    rows = [session.prefill(prompt)]
    for _ in range(steps):
        rows.append(session.step(int(rows[-1].argmax())))
    return torch.cat(rows)


def session_of(weights, *options):
    engine = Engine(weights, *options)
    return Session(engine, PlainSteps(engine))


def ids(token_ids, length, seed=0):
    return token_ids(length, seed=seed).tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.one_of(3)
def test_pieces_are_the_prompt(make, clear_ids, family, conversion):
    model = make(family, conversion)
    prompt = clear_ids(model, 3 * PIECE + 3)
    engine = Engine(model, LENGTH)
    expected = [engine.prefill(prompt), engine.step(torch.tensor([9]), torch.tensor([prompt.shape[1]]))]
    session = session_of(model, LENGTH)
    found = [session.prefill(prompt[0].tolist()), session.step(9)]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("shared", [0, 5, PIECE, 2 * PIECE + 1, 3 * PIECE])
@pytest.mark.one_of(3)
def test_a_prefix_is_reused_to_the_bit(make, token_ids, conversion, cache, shared):
    weights = DecoderWeights(make("qwen3", conversion))
    first = ids(token_ids, 3 * PIECE)
    second = first[:shared] + ids(token_ids, 3 * PIECE + 5 - shared, seed=1)
    expected = run(session_of(weights, LENGTH, cache), second)
    session = session_of(weights, LENGTH, cache)
    run(session, first)
    session.start(second)
    assert len(session.tokens) == shared // PIECE * PIECE
    assert torch.equal(run(session, second), expected)
    other = session_of(weights, LENGTH, cache)
    other.start(second)
    other.take_prefix(session)
    assert len(other.tokens) == 3 * PIECE
    assert torch.equal(run(other, second), expected)


def test_the_same_prompt_again(weights, token_ids):
    session, prompt = session_of(weights, LENGTH), ids(token_ids, 2 * PIECE)
    expected = run(session, prompt)
    session.start(prompt)
    assert len(session.tokens) == PIECE  # the last piece gives the logits
    assert torch.equal(run(session, prompt), expected)


def test_drawn_tokens_run_again_when_they_are_given(weights, token_ids):
    session, prompt = session_of(weights, LENGTH), ids(token_ids, PIECE - 2)
    run(session, prompt, steps=6)
    assert len(session.tokens) == PIECE + 4
    assert session.reusable == 0
    given = [*session.tokens, 7, 8]
    assert torch.equal(session.extend([7, 8]), session_of(weights, LENGTH).prefill(given))
    assert session.tokens == given


def test_truncating(weights, token_ids):
    prompt = ids(token_ids, PIECE + 3)
    session = session_of(weights, LENGTH)
    session.prefill(prompt)
    expected = [session.step(token) for token in (5, 6, 7)]
    session.truncate(len(prompt) + 1)
    assert [torch.equal(session.step(token), want) for token, want in zip((6, 7), expected[1:], strict=True)] == [
        True
    ] * 2
    session.truncate(PIECE - 1)
    assert session.reusable == 0
    assert torch.equal(session.prefill(prompt), session_of(weights, LENGTH).prefill(prompt))


def test_sessions_do_not_see_each_other(weights, token_ids):
    prompts = [ids(token_ids, length, seed=length) for length in (5, PIECE, 20)]
    expected = [run(session_of(weights, LENGTH), prompt) for prompt in prompts]
    sessions = [session_of(weights, LENGTH) for _ in prompts]
    rows = [[session.prefill(prompt)] for session, prompt in zip(sessions, prompts, strict=True)]
    for _ in range(6):
        for session, row in zip(sessions, rows, strict=True):
            row.append(session.step(int(row[-1].argmax())))
    for row, want in zip(rows, expected, strict=True):
        assert torch.equal(torch.cat(row), want)


def test_what_a_session_refuses(weights, token_ids):
    session = session_of(weights, 16)
    for prompt in ([], ids(token_ids, 17)):
        with pytest.raises(LarosaError, match=f"a prompt of {len(prompt)} tokens does not fit a session of 16"):
            session.prefill(prompt)
    with pytest.raises(LarosaError, match="has to run a prompt before a step"):
        session.step(5)
    session.start([5] * 16)
    with pytest.raises(LarosaError, match="has to run a prompt before a step"):
        session.step(5)
    session.prefill([5] * 16)
    with pytest.raises(LarosaError, match="a session of 16 tokens is full"):
        session.step(5)
