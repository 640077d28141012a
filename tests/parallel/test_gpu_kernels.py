"""Ranks' engines over the kernels of a GPU, in the emulator: sharded adapters, lists that differ from rank to rank."""

from __future__ import annotations

import threading

import pytest
import torch

from larosa.decoding import Engine, layers
from larosa.ops.backend import OPERATORS
from larosa.ops.cuda import kernels
from larosa.ops.cuda import launch as cuda_launch
from larosa.parallel import Over
from tests.ops.gpu.conftest import compiled, emulator, selects_from_short_ones  # noqa: F401 - fixtures

from .test_shard import CONVERSIONS, saved  # noqa: F401 - a fixture

TOKENS, PROMPT = 4, 3


@pytest.fixture
def as_on_gpus(emulator, monkeypatch):  # noqa: F811
    one_at_a_time = threading.Lock()

    def launch(*arguments):
        with one_at_a_time:
            emulator.launch(*arguments)

    monkeypatch.setattr(cuda_launch, "launch", launch)
    monkeypatch.setattr(cuda_launch, "machine", emulator.machine)
    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.larosa, name, getattr(kernels, name))
    monkeypatch.setattr(layers, "_on_gpu", lambda linear: True)


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_gpus", "selects_from_short_ones")
@pytest.mark.parametrize(
    ("conversion", "over"),
    [
        ("block, 8 bits", Over.ALL),
        ("block, 8 bits", Over.OWN),
        ("layer", Over.OWN),
        ("4 bits, layer, 8 bits", Over.ALL),
        ("4 bits, layer, 8 bits", Over.OWN),
        ("8 bits, thresholds", Over.ALL),
    ],
)
def test_steps_are_the_shards_forward(saved, on_ranks, load_here, token_ids, conversion, over):  # noqa: F811
    """Whose logits are the whole model's: see `test_shard.py`."""
    sizes = {"head_dim": 32 if "weights" in CONVERSIONS[conversion] else 16, "intermediate_size": 128}
    _, folder = saved("llama", conversion, num_hidden_layers=2, **sizes)
    tokens = token_ids(1, TOKENS, seed=3)

    def run(ranks):
        shard = load_here(folder, ranks)
        expected = shard(tokens, use_cache=False).logits[0, PROMPT:]
        engine = Engine(shard, TOKENS)
        engine.prefill(tokens[:, :PROMPT])
        steps = range(PROMPT, TOKENS)
        return torch.cat([engine.step(tokens[0, at : at + 1], torch.tensor([at])) for at in steps]), expected

    for found, expected in on_ranks(2, run, over):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
