"""Decoding by one graph a token gives the tokens of decoding step by step."""

import pytest
import torch

from larosa.decoding import Engine
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.loop import continue_prompt
from larosa.decoding.sampling import Sampler, Sampling
from larosa.errors import LarosaError

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


CONVERSIONS = {
    "sparse": {},
    "thresholds": {"selection": "threshold"},
    "thresholds without adapters": {"selection": "threshold", "rotation": "none"},
    "teal": {"method": "teal"},
}


@pytest.fixture(params=["dense", *CONVERSIONS])
def model(request, make_model, quick_convert):
    source = make_model("llama")
    if request.param != "dense":
        source = quick_convert(source, sparsity=0.5, **CONVERSIONS[request.param])
    return source.to(DEVICE)


def prompts(token_ids):
    return [token_ids(1, length, seed=length) for length in (3, 17, 1)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.8, seed=7),
        Sampling(1.0, top_p=0.7, seed=7),
        Sampling(repetition_penalty=1.5),
        Sampling(1.0, 20, 0.9, 0.02, 1.5, seed=7),
    ],
    ids=["greedy", "drawn", "top_p", "penalised", "all"],
)
def test_gives_the_tokens_of_separate_steps(model, token_ids, sampling):
    for prompt in prompts(token_ids):
        samplers = [Sampler(sampling, device=DEVICE, kernels=kernels) for kernels in (False, True)]
        expected = list(continue_prompt(Engine(model, 64), prompt, 40, samplers[0]))
        assert list(GraphLoop(Engine(model, 64), samplers[1]).continue_prompt(prompt, 40)) == expected


def test_serves_several_prompts(model, token_ids):
    loop = GraphLoop(Engine(model, 64), Sampler(device=DEVICE, kernels=True))
    for prompt in prompts(token_ids):
        expected = list(continue_prompt(Engine(model, 64), prompt, 30, Sampler(device=DEVICE)))
        assert list(loop.continue_prompt(prompt, 30)) == expected
        assert list(loop.continue_prompt(prompt, 30)) == expected


def test_ends_at_a_stop_token_and_at_the_end_of_the_cache(model, token_ids):
    prompt = token_ids(1, 5, seed=1)
    loop = GraphLoop(Engine(model, 45), Sampler(device=DEVICE, kernels=True))
    tokens = list(loop.continue_prompt(prompt, 41))
    assert len(tokens) == 41
    first = tokens.index(tokens[20])
    assert list(loop.continue_prompt(prompt, 41, stop={tokens[20]})) == tokens[: first + 1]


def test_logits_that_are_not_finite(model, token_ids):
    model.model.layers[-1].mlp.down_proj.weight.data.fill_(torch.nan)
    loop = GraphLoop(Engine(model, 64), Sampler(device=DEVICE, kernels=True))
    with pytest.raises(LarosaError, match="NaN or Inf"):
        list(loop.continue_prompt(token_ids(1, 5, seed=1), 30))
