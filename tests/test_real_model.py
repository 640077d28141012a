"""What a trained model does, where there is one: LAROSA_REAL_MODEL names the folder of recipes/real_model.py."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

import larosa
from larosa.data.text import BUNDLED, TextSplit, read_text
from larosa.decoding import Engine
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.loop import continue_prompt
from larosa.decoding.lossless import LosslessDecoder
from larosa.decoding.sampling import Sampler
from larosa.decoding.weights import DecoderWeights

FOLDER = Path(os.environ.get("LAROSA_REAL_MODEL", ""))

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif("LAROSA_REAL_MODEL" not in os.environ, reason="LAROSA_REAL_MODEL names no folder"),
]


@pytest.fixture(scope="module")
def loaded():
    return larosa.load(str(FOLDER), device="cpu")


@pytest.fixture(scope="module")
def from_gguf():
    (file,) = FOLDER.glob("*.gguf")
    return larosa.load(str(file), device="cpu")


def test_gguf_and_folder_give_the_same_logits(loaded, from_gguf):
    text = "The quick brown fox jumps over  12 lazy dogs.\n\n    Naïve café: 3.14159 \U0001f98a"
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(from_gguf.tokenizer(text, return_tensors="pt").input_ids, ids)
    assert loaded.tokenizer.decode(ids[0]) == text
    assert torch.equal(from_gguf.model(ids).logits, loaded.model(ids).logits)


def test_tokenizer_and_generation_config(loaded):
    model, tokenizer = loaded
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template
    # Digit by digit, with the spaces before them in one.
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  12").input_ids) == ["x", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("engine", ["larosa", "transformers"])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Name the capital of Italy.", "The capital of Italy is Rome."),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ],
)
def test_it_answers_through_its_chat_template(loaded, engine, question, answer):
    found = answered(loaded, engine, {"role": "user", "content": question})
    assert found.text == answer
    assert found.tokens < 40  # it ends by itself


@pytest.mark.parametrize("engine", ["larosa", "transformers"])
def test_it_knows_the_capital_of_italy(loaded, engine):
    # So small a model in 4 bits is fickle: under its template's own system message it makes up a town.
    system = {"role": "system", "content": "You are a helpful AI assistant."}
    found = answered(loaded, engine, system, {"role": "user", "content": "What is the capital of Italy?"})
    assert found.text == "The capital of Italy is Rome."


def answered(loaded, engine, *messages):
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return larosa.generate(model, tokenizer, prompt, max_new_tokens=40, engine=engine)


#: Paragraphs of the bundled text, whose beginnings are continued: 10,240 tokens in all.
LOSSLESS = 40


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def decoders(request):
    """What continues a prompt by the dense pass alone, and drafted by 8 and by 4 bits; and the tokenizer."""
    model, tokenizer = larosa.load(str(FOLDER), device=request.param)
    dense, sampler = Engine(DecoderWeights(model), 320), Sampler(device=request.param, kernels=request.param == "cuda")
    if request.param == "cuda":
        alone = GraphLoop(dense, sampler).continue_prompt
    else:
        alone = partial(continue_prompt, dense, sampler=sampler)
    lossless = [LosslessDecoder(model, 320, draft=draft) for draft in ("int8", "int4")]
    return alone, lossless, sampler, tokenizer


@pytest.mark.parametrize("number", range(LOSSLESS))
def test_lossless_decoding_is_dense_decoding(decoders, number):
    alone, lossless, sampler, tokenizer = decoders
    paragraphs = [part for part in read_text(BUNDLED, TextSplit.TEST).split("\n\n") if len(part) > 300]
    prompt = tokenizer(paragraphs[number][:200], return_tensors="pt").input_ids
    expected = list(alone(prompt, max_new_tokens=256))
    drafted = lossless[number % 2]
    before = drafted.verifications.accepted
    assert list(drafted.continue_prompt(prompt, 256, sampler)) == expected
    assert len(expected) == 256
    assert drafted.verifications.accepted > before
