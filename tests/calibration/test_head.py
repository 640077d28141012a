"""Scores of the head's input against gradients for every token of the vocabulary, one by one."""

from __future__ import annotations

import pytest
import torch

from larosa.architectures import find_architecture
from larosa.calibration import head, head_scores

CPU = torch.device("cpu")


def inputs_of_the_head(model, sequences):
    return torch.cat([model.model(ids[None]).last_hidden_state[0] for ids in sequences]).double()


def expected_scores(x, W):
    """By autograd for each token that could follow, and by the divergence's second order for what is dropped."""
    squares = torch.zeros(x.shape[1], dtype=torch.float64)
    for row in x:
        row = row.clone().requires_grad_()
        log_p = (W @ row).log_softmax(0)
        for p, of_token in zip(log_p.exp().tolist(), log_p, strict=True):
            squares += p * torch.autograd.grad(of_token, row, retain_graph=True)[0].square()
    score = (squares / len(x)).sqrt()
    together = apart = 0.0
    for row in x:
        dropped = (row * score).abs().argsort()[: len(row) // 2]
        lost = torch.zeros_like(row)
        lost[dropped] = row[dropped]
        p, moved = (W @ row).softmax(0), W @ lost
        together += float((p * (moved - (p * moved).sum()).square()).sum())
        apart += float((lost * score).square().sum())
    return score * (together / apart) ** 0.5


@pytest.mark.parametrize("positions", [512, 7])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_gradients_token_by_token(make_model, token_ids, monkeypatch, family, positions):
    monkeypatch.setattr(head, "_POSITIONS", positions)
    monkeypatch.setattr(head, "_PIECE", 64 * 5)  # several pieces, the last one short
    model, sequences = make_model(family, torch.float64), token_ids(2, 9)
    found = head_scores(model, find_architecture(family), sequences, CPU)
    with torch.no_grad():
        x = inputs_of_the_head(model, sequences)
    expected = expected_scores(x, model.lm_head.weight.detach())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_estimate_the_divergence_of_half_of_the_entries(make_model, token_ids):
    """For a head that predicts much alike, where higher orders do not matter."""
    model, sequences = make_model("llama", torch.float64), token_ids(4, 16)
    with torch.no_grad():
        model.lm_head.weight *= 0.1
        score = head_scores(model, find_architecture("llama"), sequences, CPU)
        x, W = inputs_of_the_head(model, sequences), model.lm_head.weight
        least = (x * score).abs().argsort(-1)[:, : x.shape[1] // 2]
        kept = x.scatter(-1, least, 0)
        before, after = ((each @ W.T).log_softmax(-1) for each in (x, kept))
        divergence = (before.exp() * (before - after)).sum()
        estimate = ((x - kept) * score).square().sum() / 2
    assert float(divergence) == pytest.approx(float(estimate), rel=0.05)


def test_looks_at_few_tokens(make_model, token_ids, monkeypatch):
    monkeypatch.setattr(head, "_TOKENS", 16)
    model, architecture, sequences = make_model("llama"), find_architecture("llama"), token_ids(5, 9)
    found = head_scores(model, architecture, sequences, CPU)
    assert torch.equal(found, head_scores(model, architecture, sequences[:2], CPU))


def test_a_head_of_zeros_is_worth_nothing(make_model, token_ids):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = head_scores(model, find_architecture("llama"), token_ids(2, 9), CPU)
    assert torch.equal(found, torch.zeros_like(found))
