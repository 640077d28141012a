"""What the first rank calls, all ranks run."""

from __future__ import annotations

import queue

import pytest
import torch

from larosa import LarosaError
from larosa.decoding.sampling import Sampling
from larosa.parallel import Lead
from larosa.runtime import LLM, Request, Scheduler, follow
from larosa.runtime import scheduler as scheduler_module
from larosa.runtime import session as session_module

from .test_shard import saved  # noqa: F401 - a fixture

PIECE, LENGTH, PLACES = 8, 64, 3


def lead_of(ranks, failures):
    return Lead(ranks, failures.append, ranks.group)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(session_module, "PIECE", PIECE)
    monkeypatch.setattr(scheduler_module, "PIECE", PIECE)


def requests(token_ids):
    """More than there are places, some with a beginning that others have run, one with its prompt's log-probabilities.

    The last is given up.
    """
    beginning = token_ids(2 * PIECE, seed=9).tolist()
    prompts = [[*beginning, *token_ids(3 + seed, seed=seed).tolist()] for seed in range(4)]
    found = [Request(prompt, 12, Sampling(1.0, seed=seed)) for seed, prompt in enumerate(prompts)]
    found.append(Request(prompts[0], 4, prompt_logprobs=2))
    return [*found, Request(prompts[1], 30)]


@pytest.mark.usefixtures("short_pieces")
def test_requests_are_written_by_all_ranks(saved, on_ranks, load_here, tokenizer, token_ids):  # noqa: F811
    model, folder = saved("llama", "thresholds")
    alone = LLM(model, tokenizer, LENGTH)
    expected = [list(alone.stream(request)) for request in requests(token_ids)[:-1]]

    def run(ranks):
        failures = []
        lead = lead_of(ranks, failures)
        llm = LLM(load_here(folder, ranks), tokenizer, LENGTH, lead=lead)
        if not ranks.first:
            follow(llm, PLACES)
            return None
        scheduler = Scheduler(llm, PLACES)
        events = [queue.SimpleQueue() for _ in requests(token_ids)]
        *_, given_up = scheduler.submit(requests(token_ids), [each.put for each in events], 120.0)
        given_up.cancel()
        found = []
        for coming, ends in zip(events, expected, strict=False):
            found.append([coming.get(timeout=60) for _ in ends])
        counts = scheduler.counts
        scheduler.close()
        lead.end()
        assert not failures
        return found, counts

    (found, counts), _ = on_ranks(2, run)
    for own, want in zip(found, expected, strict=True):
        assert [(event.text, event.token, event.finish_reason) for event in own] == [
            (event.text, event.token, event.finish_reason) for event in want
        ]
    likely, want = ([told.logprob for told in events[0].prompt_logprobs[1:]] for events in (found[-1], expected[-1]))
    assert likely == pytest.approx(want, abs=1e-4)
    assert counts.cached_tokens > 0
    assert counts.finished["cancelled"] == 1
    assert counts.finished["error"] == 0


def test_tensors_and_names_of_arguments_are_passed_on(on_ranks):
    def run(ranks):
        lead, seen = lead_of(ranks, []), []
        first = lead.shared(lambda x, *, add: seen.append(x + add))
        second = lead.shared(seen.append)
        if ranks.first:
            second("text")
            first(torch.arange(1000), add=1)
            lead.end()
        else:
            lead.follow()
        return seen[0], seen[1].tolist() == list(range(1, 1001))

    assert on_ranks(3, run) == [("text", True)] * 3


def test_a_rank_that_fails_says_so(on_ranks):
    def run(ranks):
        lead = lead_of(ranks, [])

        def fail():
            if ranks.rank == 1:
                raise ValueError("no room")

        call = lead.shared(fail)
        if ranks.first:
            call()
        elif ranks.rank == 1:
            with pytest.raises(LarosaError, match=r"^rank 1 cannot go on: no room$"):
                lead.follow()

    on_ranks(2, run)


def test_a_call_that_fails_on_the_first_rank_is_told(on_ranks):
    def run(ranks):
        failures = []
        lead = lead_of(ranks, failures)
        call = lead.shared(lambda: 1 // ranks.rank)
        if not ranks.first:
            lead.follow()
            return None
        with pytest.raises(ZeroDivisionError):
            call()
        lead.end()
        return [type(error) for error in failures]

    assert on_ranks(2, run)[0] == [ZeroDivisionError]
