"""The decode engine's steps over the GPU's kernels give the logits of the model's own forward."""

import pytest
import torch

from larosa.decoding import CacheDtype, Engine, layers
from larosa.ops.backend import OPERATORS

TOKENS = 6


@pytest.fixture
def engine(target, monkeypatch):
    """engine(model): an engine over the target's operators, which reads weights as on a GPU."""
    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.larosa, name, getattr(target.kernels, name))
    monkeypatch.setattr(layers, "_on_gpu", lambda linear: True)
    # On a CPU a step is recorded by what it calls of the CPU's library, and these kernels call nothing of it.
    monkeypatch.setattr(Engine, "_replayed", Engine._run)
    return lambda model, *options: Engine(model.to(target.device), TOKENS, *options)


@pytest.mark.usefixtures("selects_from_short_ones")
@pytest.mark.parametrize(
    "options",
    [{}, {"selection": "threshold"}, {"selection": "threshold", "rotation": "none"}],
    ids=["counts", "thresholds", "thresholds without adapters"],
)
@pytest.mark.slow_in_triton
def test_large_layers(target, engine, make_model, quick_convert, token_ids, options):
    """Of a size that fills the GPU that stands in for a large one: blocks select for themselves, or one for all."""
    sizes = {"hidden_size": 192, "intermediate_size": 360, "head_dim": 16, "num_hidden_layers": 2}
    model, tokens = quick_convert(make_model("llama", **sizes), sparsity=0.5, **options), token_ids(1, TOKENS, seed=3)
    with torch.inference_mode():
        expected = model(tokens).logits[0]
    runner = engine(model)
    runner.prefill(tokens[:, :3])
    for position in range(3, TOKENS):
        token, at = tokens[0, position : position + 1], torch.tensor([position])
        logits = runner.step(token.to(target.device), at.to(target.device))[0].cpu()
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "sparsity", "dtype"),
    [
        ("llama", 0.0, torch.float32),
        ("llama", 0.5, torch.float32),
        ("llama", 0.5, torch.bfloat16),
        ("mistral", 0.5, torch.float32),
        ("qwen3", 0.0, torch.bfloat16),
        ("qwen3", 0.5, torch.float32),
    ],
)
def test_steps_are_the_models_forward(target, engine, make_model, quick_convert, token_ids, family, sparsity, dtype):
    model = make_model(family, head_dim=16, num_hidden_layers=2)
    if sparsity:
        model = quick_convert(model, sparsity=sparsity)
    tokens = token_ids(1, TOKENS, seed=3)
    with torch.inference_mode():
        expected = model(tokens).logits[0]
    runner = engine(model.to(dtype))
    runner.prefill(tokens[:, :3])
    for position in range(3, TOKENS):
        at = torch.tensor([position], device=target.device)
        logits = runner.step(tokens[0, position : position + 1].to(target.device), at)[0].cpu()
        if dtype == torch.float32:
            torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)
        else:  # rounded weights choose some other entries
            likeness = torch.nn.functional.cosine_similarity(logits, expected[position], dim=0)
            assert likeness > (0.8 if sparsity else 0.98)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.slow_in_triton
def test_a_cache_of_8_bits(target, engine, make_model, token_ids, rounded_logits, family):
    model = make_model(family, head_dim=16, num_hidden_layers=2)
    tokens = token_ids(1, TOKENS, seed=3)
    expected = rounded_logits(model, tokens, 3)
    runner = engine(model, CacheDtype.INT8)
    found = [runner.prefill(tokens[:, :3]).cpu()]
    for position in range(3, TOKENS):
        at = torch.tensor([position], device=target.device)
        found.append(runner.step(tokens[0, position : position + 1].to(target.device), at).cpu())
    tolerance = 0.03 if target.truncates else 2e-3  # of scales, or of a digit here and there
    torch.testing.assert_close(torch.cat(found), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("int4", {"sparsity": 0.0}),
        ("int4", {"sparsity": 0.5, "rotation": "block", "adapters": "int8"}),
        ("int8", {"sparsity": 0.5, "rotation": "block", "adapters": "full"}),
        ("int8", {"sparsity": 0.25, "selection": "threshold"}),
        ("int4", {"method": "topk", "sparsity": 0.25}),
    ],
    ids=["whole", "adapters of digits", "adapters", "thresholds", "plain"],
)
@pytest.mark.slow_in_triton
def test_weights_of_few_bits(target, engine, make_model, quick_convert, token_ids, weights, options):
    """The model's own forward makes its weights of the same codes."""
    model = make_model("llama", head_dim=16, num_hidden_layers=2)
    model = quick_convert(model, weights=weights, weight_group=32, quantizer="rtn", **options)
    tokens = token_ids(1, TOKENS, seed=3)
    with torch.inference_mode():
        expected = model(tokens).logits[0]
    runner = engine(model)
    found = [runner.prefill(tokens[:, :3]).cpu()]
    for position in range(3, TOKENS):
        at = torch.tensor([position], device=target.device)
        found.append(runner.step(tokens[0, position : position + 1].to(target.device), at).cpu())
    torch.testing.assert_close(torch.cat(found), expected[2:], rtol=1e-4, atol=1e-4)
