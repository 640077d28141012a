"""The decode engine's steps over the GPU's kernels give the logits of the model's own forward."""

import pytest
import torch

from larosa.architectures import find_architecture
from larosa.config import SITES
from larosa.decoding import CacheDtype, Engine, layers
from larosa.decoding.cuda_graph import StepGraphs
from larosa.decoding.loop import continue_prompt
from larosa.decoding.lossless import LosslessDecoder
from larosa.decoding.sampling import Sampler
from larosa.decoding.weights import DecoderWeights
from larosa.formats import Int4, Int8
from larosa.ops.backend import OPERATORS
from larosa.quantizers import round_to_nearest
from tests.decoding.test_lossless import draft_always

TOKENS = 6


@pytest.fixture
def engine(target, monkeypatch):
    """engine(model): an engine over the target's operators, which reads weights as on a GPU."""
    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.larosa, name, getattr(target.kernels, name))
    monkeypatch.setattr(layers, "_on_gpu", lambda weight: True)
    # On a CPU a step is recorded by what it calls of the CPU's library, and these kernels call nothing of it.
    monkeypatch.setattr(Engine, "_replayed", Engine._run)

    def build(model, *options, **more):
        return Engine(model if isinstance(model, DecoderWeights) else model.to(target.device), TOKENS, *options, **more)

    return build


@pytest.fixture
def runs(target):
    """What takes minutes in Triton's interpreter is left to a GPU."""
    if target.truncates:
        pytest.skip("takes minutes in Triton's interpreter")


def logits_of(runner, tokens, target):
    """Those after each of tokens [1, length] from the third on."""
    found = [runner.prefill(tokens[:, :3]).cpu()]
    for position in range(3, TOKENS):
        at = torch.tensor([position], device=target.device)
        found.append(runner.step(tokens[0, position : position + 1].to(target.device), at).cpu())
    return torch.cat(found)


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
@pytest.mark.one_of(2)
@pytest.mark.slow_in_triton
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
    found = logits_of(runner, tokens, target)
    tolerance = 0.03 if target.truncates else 2e-3  # of scales, or of a digit here and there
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("int4", {"sparsity": 0.0}),
        ("int4", {"sparsity": 0.5, "rotation": "block", "adapters": "int8"}),
        ("int8", {"sparsity": 0.5, "rotation": "block", "adapters": "full"}),
        ("int8", {"sparsity": 0.25, "selection": "threshold"}),
        ("int4", {"method": "topk", "sparsity": 0.25}),
        ("int4+4", {"sparsity": 0.6, "selection": "threshold"}),
    ],
    ids=["whole", "adapters of digits", "adapters", "thresholds", "plain", "planes"],
)
@pytest.mark.slow_in_triton
def test_weights_of_few_bits(target, engine, make_model, quick_convert, token_ids, weights, options):
    """The model's own forward makes its weights of the same codes."""
    model = make_model("llama", head_dim=16, num_hidden_layers=2)
    model = quick_convert(model, weights=weights, weight_group=32, quantizer="rtn", **options)
    tokens = token_ids(1, TOKENS, seed=3)
    with torch.inference_mode():
        expected = model(tokens).logits[0]
    torch.testing.assert_close(logits_of(engine(model), tokens, target), expected[2:], rtol=1e-4, atol=1e-4)


def rows_of(runner, target, tokens, positions, texts):
    """Logits of rows run together, and of each alone in the order of positions."""
    moved = [torch.tensor(each, device=target.device) for each in (tokens, positions, texts)]
    together = runner.step(*moved[:2], texts).cpu()
    if target.device.type != "cpu":
        assert torch.equal(runner.step(*moved).cpu(), together)
    alone = torch.empty_like(together)
    for row in sorted(range(len(tokens)), key=positions.__getitem__):
        one = slice(row, row + 1)
        alone[row] = runner.step(moved[0][one], moved[1][one], texts[one])[0]
    return together, alone


@pytest.mark.usefixtures("selects_from_short_ones")
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.0},
        {"sparsity": 0.5},
        {"sparsity": 0.5, "selection": "threshold"},
        {"sparsity": 0.0, "weights": "int4", "weight_group": 32, "quantizer": "rtn"},
        {"sparsity": 0.6, "selection": "threshold", "weights": "int4+4", "weight_group": 32},
    ],
    ids=["dense", "counts", "thresholds", "codes", "planes"],
)
@pytest.mark.slow_in_triton
def test_rows_of_a_step_give_what_they_give_alone(target, engine, make_model, quick_convert, token_ids, options):
    """Of two texts, in any order; and so do the same weights whole."""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 16, "num_hidden_layers": 2}
    model = quick_convert(make_model("llama", **sizes), **options)
    runner, prompt = engine(model, texts=2), token_ids(1, 2, seed=3).to(target.device)
    for each in [runner] + [runner.beside(runner.weights.whole())] * (options["sparsity"] > 0):
        for text in (0, 1):
            each.extend(prompt, 0, text)
        together, alone = rows_of(each, target, [3, 5, 7], [3, 2, 2], [0, 0, 1])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("form", ["dense", "rounded"])
@pytest.mark.slow_in_triton
def test_whole_weights_are_those_of_before_conversion(target, engine, make_model, quick_convert, token_ids, form):
    from larosa.formats import Int4

    model, tokens = make_model("llama", head_dim=16, num_hidden_layers=2), token_ids(1, TOKENS, seed=3)
    with torch.inference_mode():
        expected = model(tokens).logits[0]
    runner = engine(quick_convert(model, sparsity=0.5))
    whole = runner.weights.whole()
    runner = runner.beside(whole if form == "dense" else whole.rounded(Int4(32), Int4(32)))
    runner.prefill(tokens[:, :3].to(target.device))
    at = torch.arange(3, TOKENS, device=target.device)
    found = runner.step(tokens[0, 3:].to(target.device), at).cpu()
    if form == "dense":
        torch.testing.assert_close(found, expected[3:], rtol=1e-4, atol=1e-4)
    else:
        assert torch.nn.functional.cosine_similarity(found, expected[3:]).min() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_graphs_of_steps(make_model, quick_convert, token_ids, sparsity):
    """Replays give what steps one operator after the other give, whatever was captured in between."""
    device, length = torch.device("cuda"), 32
    model = make_model("llama", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)
    model = quick_convert(model, sparsity=sparsity).to(device).bfloat16()
    engine = Engine(model, length, texts=2)
    graphs, prompt = StepGraphs(engine), token_ids(1, 4, seed=3).to(device)
    for text in (0, 1):
        engine.extend(prompt, 0, text)
    lengths = [4, 4]
    for rows in (2, 3, 1, 2, 8, 3):
        texts = [row % 2 for row in range(rows)]
        positions = [lengths[text] + row // 2 for row, text in enumerate(texts)]
        lengths = [length + texts.count(text) for text, length in enumerate(lengths)]
        tokens, positions, texts = (torch.tensor(x, device=device) for x in (range(3, rows + 3), positions, texts))
        expected = engine.step(tokens, positions, texts)
        for to, given in ((graphs.tokens, tokens), (graphs.positions, positions), (graphs.texts, texts)):
            to[:rows] = given
        assert torch.equal(graphs.step(rows), expected)


SPARSE = {
    "counts": {"sparsity": 0.5},
    "thresholds": {"sparsity": 0.5, "selection": "threshold", "rotation": "none"},
}


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("options", SPARSE.values(), ids=SPARSE)
def test_the_dense_pass_of_a_sparse_model(target, engine, make_model, quick_convert, token_ids, options):
    """Is the model before conversion: nothing is selected, and the MLP's activation is made by other operators."""
    tokens = token_ids(1, TOKENS, seed=3)
    dense = make_model("llama", head_dim=16, num_hidden_layers=2)
    with torch.inference_mode():
        expected = dense(tokens).logits[0]
    model = quick_convert(dense, **options).to(target.device)
    found = logits_of(engine(DecoderWeights(model).whole()), tokens, target)
    torch.testing.assert_close(found, expected[2:], rtol=1e-4, atol=1e-4)


def of_layer(architecture, layer):
    return [linear for site in SITES for linear in architecture.linears(layer, site)]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("options", "form"), [(None, Int4(32)), (SPARSE["counts"], Int8(128)), (SPARSE["thresholds"], Int4(32))]
)
def test_a_rounded_copy_for_steps(target, engine, make_model, quick_convert, token_ids, options, form):
    """Is the model with each weight rounded; the prompt's keys and values are of the weights as they were."""
    model = make_model("llama", head_dim=16, num_hidden_layers=2)
    model = model if options is None else quick_convert(model, **options)
    tokens = token_ids(1, TOKENS, seed=3)
    model, head = model.to(target.device), Int8(form.group)
    found = logits_of(engine(DecoderWeights(model).rounded(form, head)), tokens, target)
    steps = engine(model)
    steps.prefill(tokens[:, :3])
    architecture = find_architecture("llama")
    linears = [(linear, form) for layer in architecture.layers(model) for linear in of_layer(architecture, layer)]
    for linear, stored in [*linears, (architecture.head(model), head)]:
        codes, scales = round_to_nearest(linear.weight.data, stored, "")
        linear.weight.data.copy_(stored.dequantize(codes, scales, len(linear.weight), torch.float32).t())
    at = torch.tensor([3], device=target.device)
    expected = steps.step(tokens[0, 3:4].to(target.device), at).cpu()
    torch.testing.assert_close(found[1:2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "draft"),
    [
        (SPARSE["thresholds"], "int4"),
        pytest.param(None, "int8", marks=pytest.mark.slow),
        pytest.param(SPARSE["counts"], None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("runs", "engine")
def test_lossless_decoding(target, make_model, quick_convert, token_ids, monkeypatch, options, draft):
    """Steps of several rows check what cheaper ones draft, and all of them write the same keys and values."""
    draft_always(monkeypatch)
    model = make_model("llama", head_dim=16, num_hidden_layers=1)
    model = (model if options is None else quick_convert(model, **options)).to(target.device)
    prompt, new = token_ids(1, 3, seed=3), 8
    weights = DecoderWeights(model)
    expected = list(continue_prompt(Engine(weights.whole(), 3 + new), prompt, new, Sampler(device=target.device)))
    decoder = LosslessDecoder(model, 3 + new, draft=draft, in_blocks=True)
    assert list(decoder.continue_prompt(prompt, new, Sampler(device=target.device))) == expected
    assert decoder.verifications.drafted > 2
