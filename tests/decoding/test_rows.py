"""Steps of several tokens: each gives what it gives alone, to the bit, whatever else is in the step."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from larosa import LarosaError
from larosa.decoding import Engine
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.weights import DecoderWeights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CONVERSIONS = {
    "dense": None,
    "layer": {"rotation": "layer"},
    "int8 adapters": {"adapters": "int8", "rotation": "block"},
    "thresholds": {"rotation": "layer", "selection": "threshold"},
    "teal": {"method": "teal"},
    "few bits": {"weights": "int4"},
    "few bits, thresholds": {"weights": "int8", "selection": "threshold"},
}
LENGTH = 40  # the windows of the tiny models are 8


@pytest.fixture(scope="module")
def make(make_model, quick_convert):
    @cache
    def build(family, conversion, dtype=torch.float32):
        model, options = make_model(family, dtype), CONVERSIONS[conversion]
        return DecoderWeights(model if options is None else quick_convert(model, **options))

    return build


def alone(weights, ids, prompt, cache="auto"):
    """The logits after the prompt and after each token behind it, in an engine of its own."""
    engine = Engine(weights, LENGTH, cache)
    rows = [engine.prefill(ids[:, :prompt])]
    rows += [engine.step(ids[0, at : at + 1], torch.tensor([at])) for at in range(prompt, ids.shape[1])]
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.one_of(4)
def test_texts_that_join_and_leave(make, token_ids, family, conversion, cache):
    """Texts of different lengths, some of which are in a step and some not, in any order."""
    weights, chance = make(family, conversion), random.Random(0)
    texts = [token_ids(1, length, seed=length) for length in (12, 19, 25, 40)]
    prompts = [3, 11, 9, 33]
    expected = [alone(weights, ids, prompt, cache) for ids, prompt in zip(texts, prompts, strict=True)]
    engine = Engine(weights, LENGTH, cache, texts=len(texts))
    found = []
    for text, (ids, prompt) in enumerate(zip(texts, prompts, strict=True)):
        found.append([weights.logits(engine.extend(ids[:, :prompt], 0, text)[-1:])])
    positions = dict(enumerate(prompts))
    while positions:
        some = chance.sample(sorted(positions), chance.randint(1, len(positions)))
        token = torch.tensor([int(texts[text][0, positions[text]]) for text in some])
        logits = engine.step(token, torch.tensor([positions[text] for text in some]), some)
        for text, row in zip(some, logits.split(1), strict=True):
            found[text].append(row)
            positions[text] += 1
            if positions[text] == texts[text].shape[1]:
                del positions[text]
    for rows, want in zip(found, expected, strict=True):
        assert torch.equal(torch.cat(rows), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.one_of(4)
def test_positions_of_one_text(make, token_ids, family, conversion, dtype):
    """Rows in pieces of every size, over entries that other tokens have left there: as one by one."""
    weights = make(family, conversion, dtype)
    ids, others = token_ids(1, LENGTH), token_ids(1, LENGTH, seed=1)
    expected = alone(weights, ids, 3)
    engine = Engine(weights, LENGTH)
    rows, at = [engine.prefill(ids[:, :3])], 3
    for size in (2, 8, 3, 7, 4, 6, 5, 1, 1):
        positions = torch.arange(at, min(at + size, LENGTH))
        engine.step(others[0, positions], positions)  # a draft that is not taken
        rows.append(engine.step(ids[0, positions], positions))
        at += len(positions)
    assert torch.equal(torch.cat(rows), expected)


def test_what_a_step_refuses(make):
    engine = Engine(make("llama", "layer"), LENGTH, texts=2)
    for rows in (0, MAX_ROWS + 1):
        with pytest.raises(ValueError, match=f"1 to {MAX_ROWS} tokens, not {rows}"):
            engine.step(torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    with pytest.raises(IndexError, match="two rows of one cache"):
        engine.step(torch.tensor([5, 6]), torch.tensor([4, 4]), [1, 1])
    with pytest.raises(IndexError, match="not the number of one of the caches"):
        engine.step(torch.tensor([5, 6]), torch.tensor([4, 4]), [1, 2])


def test_caches_that_do_not_fit(make):
    with pytest.raises(LarosaError, match="for each of 1000000000 texts needs"):
        Engine(make("llama", "layer"), LENGTH, texts=10**9)
