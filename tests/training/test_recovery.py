"""Distillation through the selections, on models small enough to train in seconds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import larosa
from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.evaluation.zeros import ZeroCounter, sparse_prompts
from larosa.models import thresholds_of
from larosa.training.recovery import RecoverySettings, Training

SETTINGS = RecoverySettings(
    num_sequences=24, sequence_length=24, steps=12, batch=6, learning_rate=3e-3, evaluate_every=4
)


@pytest.fixture
def pair(make_model, quick_convert):
    """pair(family, **options): a dense model and a converted copy of it, both float32."""

    def make(family="llama", **options):
        return make_model(family), quick_convert(make_model(family), sparsity=0.6, **options)

    return make


def divergence(dense, model, sequences):
    """The mean over sequences, straight from the definition, in float64."""
    found = []
    with torch.no_grad(), sparse_prompts(model):
        for ids in sequences:
            p, q = (m(ids[None]).logits[0].double().log_softmax(-1) for m in (dense, model))
            found.append(float(F.kl_div(q, p, log_target=True, reduction="sum") / len(ids)))
    return sum(found) / len(found)


@pytest.mark.parametrize("options", [{}, {"selection": "threshold", "rotation": "none"}, {"method": "teal"}])
def test_the_divergence_on_held_out_text_falls(pair, token_ids, tmp_path, options):
    dense, model = pair(**options)
    sequences = token_ids(40, 24)
    before = divergence(dense, model, sequences[:16])
    training = Training(model, dense, sequences, SETTINGS, tmp_path / "state")
    training.run()
    assert training.history[0] == pytest.approx(before, rel=1e-4)
    after = divergence(dense, model, sequences[:16])
    assert training.best == pytest.approx(after, rel=1e-4)
    assert after < 0.98 * before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_as_many_entries_are_kept_afterwards(pair, token_ids, tmp_path):
    dense, model = pair(selection="top-k")
    scores = {name: p.clone() for name, p in model.named_parameters() if name.endswith("score")}
    Training(model, dense, token_ids(40, 24), SETTINGS, tmp_path / "state").run()
    with ZeroCounter(model) as zeros:
        model(token_ids(2, 20))
    promised = larosa.inspect(model).sparsity.weights
    assert zeros.actual_sparsity().min == pytest.approx(promised, abs=1e-6)
    assert all(torch.equal(scores[name], p) for name, p in model.named_parameters() if name in scores)
    architecture = find_architecture(model.config.model_type)
    assert torch.equal(architecture.head(model).weight, pair(selection="top-k")[1].lm_head.weight)


def test_thresholds_follow_the_weights_so_that_as_much_is_skipped(pair, token_ids, tmp_path):
    dense, model = pair(selection="threshold", rotation="none")
    held_out = token_ids(40, 24)[:16]

    def skipped():
        with sparse_prompts(model), ZeroCounter(model) as zeros:
            model(held_out)
        return zeros.actual_sparsity().mean

    before, thresholds = skipped(), thresholds_of(model, find_architecture(model.config.model_type))
    training = Training(model, dense, token_ids(40, 24), SETTINGS, tmp_path / "state")
    training.run()
    assert training.best_step > 0
    assert training.thresholds == thresholds_of(model, find_architecture(model.config.model_type)) != thresholds
    assert skipped() == pytest.approx(before, abs=0.01)


@pytest.mark.parametrize("options", [{}, {"selection": "threshold"}], ids=["counts", "thresholds"])
@pytest.mark.one_of(2)
def test_an_interrupted_training_goes_on_to_the_same_weights(pair, token_ids, tmp_path, monkeypatch, options):
    dense, whole = pair(**options)
    sequences = token_ids(40, 24)
    Training(whole, dense, sequences, SETTINGS, tmp_path / "whole").run()
    _, model = pair(**options)
    interrupted = Training(model, dense, sequences, SETTINGS, tmp_path / "state")
    step = interrupted._train_step

    def interrupt():
        if interrupted._step == 6:  # after the state of step 4
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(interrupted, "_train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    _, model = pair(**options)
    resumed = Training(model, dense, sequences, SETTINGS, tmp_path / "state")
    resumed.run()
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_other_settings_is_refused(pair, token_ids, tmp_path):
    dense, model = pair()
    Training(model, dense, token_ids(40, 24), SETTINGS, tmp_path / "state").run()
    other = RecoverySettings(**{**vars(SETTINGS), "seed": 1})
    with pytest.raises(LarosaError, match=r"other settings \(seed\)"):
        Training(pair()[1], dense, token_ids(40, 24), other, tmp_path / "state").run()
    other_counts = pair(alphas=larosa.config.PerSite(h1=0.9))[1]
    with pytest.raises(LarosaError, match=r"other settings \(conversion\)"):
        Training(other_counts, dense, token_ids(40, 24), SETTINGS, tmp_path / "state").run()
    torch.save({"settings": {}}, tmp_path / "state")  # of before thresholds were kept in it
    with pytest.raises(LarosaError, match="not the state of a recovery; delete it"):
        Training(pair()[1], dense, token_ids(40, 24), SETTINGS, tmp_path / "state").run()
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(LarosaError, match="not the state of a recovery; delete it"):
        Training(pair()[1], dense, token_ids(40, 24), SETTINGS, tmp_path / "state").run()


def test_training_stops_when_it_no_longer_gains(pair, token_ids, tmp_path):
    dense, model = pair()
    wild = RecoverySettings(**{**vars(SETTINGS), "learning_rate": 0.9, "steps": 400, "evaluate_every": 1})
    training = Training(model, dense, token_ids(40, 24), wild, tmp_path / "state")
    training.run()
    assert len(training.history) < 60
    assert training.best == min(training.history)


def test_sequences_are_no_longer_than_the_context_unless_asked_to_be():
    assert [RecoverySettings().checked(context).sequence_length for context in (64, 8192)] == [64, 512]
    assert RecoverySettings(sequence_length=32).checked(64).sequence_length == 32
    with pytest.raises(LarosaError, match="outside the model's context of 2 to 64"):
        RecoverySettings(sequence_length=65).checked(64)
