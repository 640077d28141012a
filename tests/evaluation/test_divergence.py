"""The statistics against numpy in float64, written after llama.cpp's formulas rather than ours."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from larosa.evaluation import divergence
from larosa.evaluation.divergence import PERCENTILES, Comparison, TokenScores


def pair(positions, vocabulary, dtype=torch.float32, seed=0):
    """Logits of two models that are alike, and tokens that came."""
    generator = torch.Generator().manual_seed(seed)
    dense = 3 * torch.randn(positions, vocabulary, generator=generator)
    logits = dense + 0.7 * torch.randn(positions, vocabulary, generator=generator)
    return logits.to(dtype), dense.to(dtype), torch.randint(vocabulary, (positions,), generator=generator)


def mean_and_uncertainty(values):
    """llama.cpp's, by sums of values and of squares."""
    mean = values.sum() / len(values)
    return mean, math.sqrt(((values**2).sum() / len(values) - mean**2) / (len(values) - 1))


def by_hand(logits, dense, ids):
    """Every number that llama-perplexity prints."""

    def log_softmax(x):
        x = x.double().numpy()
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    q, p = log_softmax(logits), log_softmax(dense)
    rows, ids = np.arange(len(ids)), ids.numpy()
    nll, base = -q[rows, ids], -p[rows, ids]
    kl, change = (np.exp(p) * (p - q)).sum(-1), np.exp(-nll) - np.exp(-base)
    (loss, loss_error), (dense_loss, dense_error) = mean_and_uncertainty(nll), mean_and_uncertainty(base)
    covariance = ((nll * base).mean() - loss * dense_loss) / (len(nll) - 1)
    ratio_error = math.sqrt(loss_error**2 + dense_error**2 - 2 * covariance)
    a, b = math.exp(loss), math.exp(dense_loss)
    square, square_error = mean_and_uncertainty(change**2)
    same = (q.argmax(-1) == p.argmax(-1)).mean()
    ratio = math.exp(loss - dense_loss)
    return {
        "perplexity": (a, a * loss_error),
        "reference_perplexity": (b, b * dense_error),
        "correlation": covariance / (loss_error * dense_error),
        "log_perplexity_ratio": (loss - dense_loss, ratio_error),
        "perplexity_ratio": (ratio, ratio * ratio_error),
        "perplexity_difference": (
            a - b,
            math.sqrt((a * loss_error) ** 2 + (b * dense_error) ** 2 - 2 * a * b * covariance),
        ),
        "probability_change_rms": (math.sqrt(square), 0.5 / math.sqrt(square) * square_error),
        "same_top_token": (same, math.sqrt(same * (1 - same) / (len(nll) - 1))),
        **{
            name: {
                "mean": mean_and_uncertainty(values),
                "min": values.min(),
                "max": values.max(),
                "percentiles": {f"{each:g}": np.percentile(values, each) for each in PERCENTILES},
            }
            for name, values in (("kl_divergence", kl), ("probability_change", change))
        },
    }


def numbers(found):
    """A comparison as `by_hand` gives it."""
    if isinstance(found, dict):
        if set(found) == {"value", "stderr"}:
            return found["value"], found["stderr"]
        return {key: numbers(value) for key, value in found.items()}
    return found


def flat(found, path=""):
    if isinstance(found, dict):
        return {key: value for name, part in found.items() for key, value in flat(part, f"{path}{name}.").items()}
    if isinstance(found, tuple):
        return {f"{path}value": found[0], f"{path}error": found[1]}
    return {path: found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [2, 11, 400])
def test_every_statistic_by_hand(monkeypatch, dtype, positions):
    monkeypatch.setattr(divergence, "_ELEMENTS", 7 * 53)  # several parts, the last one shorter
    logits, dense, ids = pair(positions, 53, dtype)
    scores = TokenScores.of(logits, dense, ids)
    found = {"perplexity": numbers(asdict(scores.perplexity())), **numbers(asdict(Comparison.of(scores)))}
    assert flat(found) == pytest.approx(flat(by_hand(logits, dense, ids)), rel=1e-9, abs=1e-12)
    if positions == 400:
        assert 0.2 < found["same_top_token"][0] < 0.8
        assert found["probability_change"]["min"] < 0 < found["probability_change"]["max"]


def test_windows_are_joined():
    logits, dense, ids = pair(90, 31)
    parts = [TokenScores.of(logits[rows], dense[rows], ids[rows]) for rows in (slice(0, 40), slice(40, 90))]
    for joined, whole in zip(TokenScores.joined(parts), TokenScores.of(logits, dense, ids), strict=True):
        assert torch.equal(joined, whole)


def test_a_large_vocabulary_takes_little_memory():
    logits, dense, ids = pair(64, 152_064, torch.bfloat16)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
            return result

    with Largest() as largest:
        found = TokenScores.of(logits, dense, ids)
    assert len(found.divergence) == 64
    assert 1 << 20 < largest.size <= divergence._ELEMENTS


def test_one_token_has_no_errors():
    found = Comparison.of(TokenScores.of(*pair(1, 16)))
    assert found.kl_divergence.mean.stderr is None
    assert found.kl_divergence.min == found.kl_divergence.max == found.kl_divergence.percentiles["99.9"]
    assert found.correlation is None
    assert f"{found.kl_divergence.mean:.4f}" == f"{found.kl_divergence.min:.4f}"
    json.dumps(asdict(found), allow_nan=False)


def test_a_model_beside_itself():
    logits, _, ids = pair(30, 64)
    found = Comparison.of(TokenScores.of(logits, logits, ids))
    assert (found.kl_divergence.min, found.kl_divergence.max) == (0, 0)
    assert asdict(found.probability_change_rms) == {"value": 0, "stderr": 0}
    assert asdict(found.same_top_token) == {"value": 1, "stderr": 0}
    assert asdict(found.perplexity_ratio) == {"value": 1, "stderr": 0}
    assert found.correlation == pytest.approx(1)


def test_without_a_reference_there_is_nothing_to_compare():
    logits, _, ids = pair(30, 64)
    assert Comparison.of(TokenScores.of(logits, None, ids)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_bad_logits_are_seen_on_either_side(value, place):
    *both, ids = pair(5, 9)
    both[place][3, 2] = value
    assert not TokenScores.of(*both, ids).finite
