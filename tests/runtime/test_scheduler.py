"""Many requests over one model: each gets what it gets alone."""

from __future__ import annotations

import copy
import queue
import time

import pytest
import torch

from larosa import LarosaError
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.sampling import Sampling
from larosa.runtime import LLM, ClosedError, DeadlineError, QueueFullError, Request, Scheduler
from larosa.runtime import scheduler as scheduler_module
from larosa.runtime import session as session_module

PIECE = 8


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(session_module, "PIECE", PIECE)
    monkeypatch.setattr(scheduler_module, "PIECE", PIECE)


@pytest.fixture
def make(make_model, quick_convert, tokenizer):
    def build(**options):
        model = quick_convert(make_model("llama", max_position_embeddings=256), **options)
        model.generation_config.eos_token_id = None
        return LLM(model, tokenizer)

    return build


@pytest.fixture
def llm(make):
    return make(dense_first_token=True)


class Client:
    """Collects the events of one request."""

    def __init__(self):
        self._events = queue.SimpleQueue()
        self.times = []

    def __call__(self, event):
        self.times.append(time.monotonic())
        self._events.put(event)

    def events(self):
        found = [self._events.get(timeout=60)]
        while not isinstance(found[-1], Exception) and not found[-1].finish_reason:
            found.append(self._events.get(timeout=60))
        return found


def submit(scheduler, *requests, seconds=60.0):
    clients = [Client() for _ in requests]
    return clients, scheduler.submit(requests, clients, seconds)


def request(token_ids, length, seed, tokens=12, **options):
    return Request(token_ids(length, seed=seed).tolist(), tokens, Sampling(1.0, seed=seed), **options)


@pytest.mark.parametrize("options", [{"dense_first_token": True}, {"prefill": "dense"}, {"method": "teal"}])
def test_everybody_gets_what_they_get_alone(make, token_ids, options):
    llm = make(**options)
    shared = token_ids(3 * PIECE, seed=99).tolist()
    requests = [request(token_ids, 1 + 5 * seed, seed, 5 + 7 * (seed % 4), logprobs=2) for seed in range(8)]
    requests += [
        Request([*shared, 5 + i], 9, Sampling(seed=i), prompt_logprobs=1 if i == 2 else None) for i in range(4)
    ]
    expected = [list(llm.stream(one)) for one in requests]
    scheduler = Scheduler(llm, max_sequences=3)
    for _ in range(2):  # the second time with much to reuse
        clients, _ = submit(scheduler, *requests)
        assert [client.events() for client in clients] == expected
    scheduler.close()
    assert scheduler.counts.finished == {"stop": 0, "length": 24, "cancelled": 0, "timeout": 0, "error": 0}
    assert scheduler.counts.drawn_tokens == 2 * sum(one.max_tokens for one in requests)


def test_lossless_texts_are_drafted_for_while_they_are_alone(make_model, quick_convert, tokenizer, token_ids):
    """Whether a token was drafted, or ran beside others, does not show: neither in it nor in its log-probability."""
    model = quick_convert(make_model("llama", max_position_embeddings=256), sparsity=0.1)
    model.generation_config.eos_token_id = None
    llm = LLM(model, tokenizer, lossless=True)
    requests = [request(token_ids, 5 + seed, seed, 10 + 40 * seed, logprobs=1) for seed in range(4)]
    expected = [list(llm.stream(one)) for one in requests]
    scheduler = Scheduler(llm, max_sequences=3)
    clients, _ = submit(scheduler, *requests)
    assert [client.events() for client in clients] == expected
    scheduler.close()
    assert scheduler.counts.finished["length"] == len(requests)
    verifications = scheduler._sessions[0]._speculation.verifications
    assert 0 < verifications.tokens < sum(one.max_tokens for one in requests)
    assert verifications.accepted > 0


def test_a_prompt_that_others_are_running_is_shared(llm, token_ids):
    prompt = token_ids(5 * PIECE + 3).tolist()
    requests = [Request(prompt, 4, Sampling(1.0, seed=seed)) for seed in range(3)]
    expected = [list(llm.stream(one)) for one in requests]
    scheduler = Scheduler(llm, max_sequences=3)
    clients, tickets = submit(scheduler, *requests)
    assert [client.events() for client in clients] == expected
    scheduler.close()
    assert sum(ticket.cached_tokens for ticket in tickets) == 2 * 5 * PIECE
    assert scheduler.counts.cached_tokens == 2 * 5 * PIECE


def test_a_text_goes_on_while_a_long_prompt_runs(llm, token_ids):
    scheduler = Scheduler(llm, max_sequences=2)
    (writer,), _ = submit(scheduler, request(token_ids, 4, 1, 200))
    while len(writer.times) < 3:
        time.sleep(0.001)
    begun = time.monotonic()
    (reader,), _ = submit(scheduler, request(token_ids, 20 * PIECE, 2, 1))
    (event,) = reader.events()
    assert event.token is not None
    # About one token between any two of its 20 pieces.
    assert sum(begun < at < reader.times[0] for at in writer.times) >= 15
    scheduler.close()


def test_whoever_leaves_makes_room(llm, token_ids):
    scheduler = Scheduler(llm, max_sequences=1, max_waiting=2)
    (_, second, third), tickets = submit(scheduler, *(request(token_ids, 5, seed, 240) for seed in range(3)))
    with pytest.raises(QueueFullError, match="requests are waiting"):
        submit(scheduler, *(request(token_ids, 5, 4) for _ in range(3)))
    tickets[0].cancel()
    tickets[2].cancel()
    short = request(token_ids, 5, 4)
    (fourth,), _ = submit(scheduler, short)
    expected = list(llm_alone(llm, short))
    assert len(second.events()) == 240
    assert fourth.events() == expected
    scheduler.close()
    assert len(third.times) == 0
    assert scheduler.counts.finished["cancelled"] == 2
    assert scheduler.running == scheduler.waiting == 0


def llm_alone(llm, request):
    """What another model of the same weights gives: the scheduler's must not run in two threads."""
    return LLM(copy.deepcopy(llm.weights._model), llm.tokenizer).stream(request)


def test_too_late(llm, token_ids):
    scheduler = Scheduler(llm, max_sequences=1)
    clients, _ = submit(scheduler, *(request(token_ids, 5, seed, 240) for seed in range(2)), seconds=0.02)
    for client in clients:
        assert isinstance(client.events()[-1], DeadlineError)
    scheduler.close()
    assert scheduler.counts.finished["timeout"] == 2


def test_closing_ends_everybody(llm, token_ids):
    scheduler = Scheduler(llm, max_sequences=1)
    clients, _ = submit(scheduler, *(request(token_ids, 5, seed, 240) for seed in range(2)))
    scheduler.close()
    for client in clients:
        assert isinstance(client.events()[-1], ClosedError)
    with pytest.raises(ClosedError):
        submit(scheduler, request(token_ids, 5, 1))
    assert not scheduler.alive


def test_a_failure_is_its_own_requests(llm, token_ids, monkeypatch):
    good, bad = request(token_ids, 5, 1, 20), request(token_ids, 5, 2, 20)
    expected = list(llm.stream(good))
    scheduler = Scheduler(llm, max_sequences=2)
    llm.weights.embedding[77] = float("nan")
    poisoned = Request([9, 77], 3)
    # A receiver that raises is one that has gone.
    (healthy, failing), _ = submit(scheduler, good, poisoned)
    scheduler.submit([bad], [lambda event: 1 / 0], 60.0)
    assert healthy.events() == expected
    (error,) = failing.events()
    assert isinstance(error, LarosaError)
    assert "NaN or Inf" in str(error)
    again, _ = submit(scheduler, good)
    assert again[0].events() == expected
    scheduler.close()
    assert scheduler.counts.finished["cancelled"] == 1


def test_what_is_refused(llm, token_ids):
    with pytest.raises(LarosaError, match="sequences must be at least 1, not 0"):
        Scheduler(llm, max_sequences=0)
    with pytest.raises(LarosaError, match="lower --max-num-seqs or --max-model-len"):
        Scheduler(llm, max_sequences=10**9)
    scheduler = Scheduler(llm, max_sequences=1)
    for prompt, tokens in (([], 1), ([5] * 250, 7)):
        with pytest.raises(LarosaError, match="do not fit a session of 256"):
            submit(scheduler, Request(prompt, tokens))
    scheduler.close()


def test_a_step_of_many_is_the_steps_of_each(llm, token_ids):
    prompts = [token_ids(length, seed=length).tolist() for length in (3, 9, 30)]
    sessions = [llm.session() for _ in prompts]
    expected = []
    for prompt in prompts:
        session = llm.session()
        session.prefill(prompt)
        expected.append(session.step(7))
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    assert torch.equal(llm.step(sessions, [7, 7, 7]), torch.cat(expected))


@pytest.mark.gpu
def test_steps_together_on_a_gpu_are_the_steps_of_each(make_model, quick_convert, tokenizer, token_ids):
    model = quick_convert(make_model("llama", max_position_embeddings=256)).to("cuda", torch.bfloat16)
    llm = LLM(model, tokenizer)
    prompts = [token_ids(length, seed=length).tolist() for length in range(3, 4 + MAX_ROWS)]
    expected = []
    for prompt in prompts:
        session = llm.session()
        session.prefill(prompt)
        expected.append([session.step(token) for token in (7, 8, 9)])
    sessions = llm.sessions(len(prompts))  # one more than a step takes
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    for step, token in enumerate((7, 8, 9)):
        assert torch.equal(llm.step(sessions, [token] * len(prompts)), torch.cat([each[step] for each in expected]))
