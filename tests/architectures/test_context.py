"""How long texts may be, with and without scaled rotary embeddings."""

from __future__ import annotations

import pytest
import torch

import larosa
from larosa.architectures.context import context_length
from larosa.decoding import Engine
from larosa.decoding.forward import ForwardEngine

SCALED = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
    },
}


@pytest.mark.parametrize(("kind", "length"), [("yarn", 512), ("linear", 512), ("dynamic", 512), ("llama3", 128)])
def test_the_context(family_config, kind, length):
    assert context_length(family_config("llama", rope_parameters=SCALED[kind])) == length
    assert context_length(family_config("llama")) == 128


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_the_engine_beyond_the_length_before_scaling(make_model, tokenizer, words, token_ids, kind):
    model = make_model("llama", rope_parameters=SCALED[kind])
    result = larosa.generate(model, tokenizer, words(140), max_new_tokens=20, engine="larosa")
    assert 0 < result.tokens <= 20
    ids = token_ids(1, 150)
    engine, forward = Engine(model, 152), ForwardEngine(model)
    torch.testing.assert_close(engine.prefill(ids), forward.prefill(ids), atol=2e-4, rtol=1e-4)
    token, position = torch.tensor([7]), torch.tensor([150])
    torch.testing.assert_close(engine.step(token, position), forward.step(token, position), atol=2e-4, rtol=1e-4)


def test_beyond_the_length_after_scaling(make_model, tokenizer, words):
    model = make_model("llama", rope_parameters=SCALED["yarn"])
    with pytest.raises(larosa.LarosaError, match="context of 512"):
        larosa.generate(model, tokenizer, words(500), max_new_tokens=20)


def test_a_table_that_depends_on_the_length(make_model, tokenizer, words):
    model = make_model("llama", rope_parameters=SCALED["dynamic"])
    with pytest.raises(larosa.LarosaError, match="use --engine transformers"):
        larosa.generate(model, tokenizer, words(140), max_new_tokens=4, engine="larosa")
    larosa.generate(model, tokenizer, words(140), max_new_tokens=4, engine="transformers")


def test_a_context_below_the_usual_length(make_model, tokenizer, text_file):
    model = larosa.convert(make_model("llama"), tokenizer, calibration=str(text_file), num_sequences=1)
    assert model.config.larosa["calibration"]["sequence_length"] == 128
    with pytest.raises(larosa.LarosaError, match="--sequence-length 256 is over the model's context of 128"):
        larosa.convert(make_model("llama"), tokenizer, sequence_length=256)
