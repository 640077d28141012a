"""The engine on linears of few bits: against their weights in the model's own forward, and bit by bit."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from larosa.architectures import find_architecture
from larosa.benchmarks.shapes import Layout, random_quantization, random_sparse_model, set_sparsity
from larosa.config import Rotation
from larosa.decoding import Engine
from larosa.formats import WeightFormat
from larosa.models import QuantizedLinear, head_selector, set_thresholds
from larosa.ops.low_bit import low_bit_linear_in_integers
from larosa.sparsity import SiteSizes
from larosa.sparsity.prices import no_thresholds

LENGTH, PROMPT = 24, 7
CONVERSIONS = {
    "whole": {"sparsity": 0.0},
    "half": {"sparsity": 0.5, "rotation": "block", "adapters": "int8"},
    "threshold": {"sparsity": 0.25, "selection": "threshold"},
    "much": {"sparsity": 0.6, "selection": "threshold"},
    "nothing": {"sparsity": 0.0, "selection": "threshold"},
    "plain": {"method": "topk", "sparsity": 0.25},
}


@pytest.fixture
def make(make_model, quick_convert):
    """make(family, weights, conversion, dtype): a tiny model of few bits."""

    def build(family, weights, conversion, dtype=torch.float32):
        options = {"weights": weights, "weight_group": 32, "quantizer": "rtn", **CONVERSIONS[conversion]}
        return quick_convert(make_model(family, dtype), **options)

    return build


@pytest.mark.parametrize(
    ("family", "weights", "conversion"),
    [(family, "int4", "half") for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3")]
    + [
        ("llama", "int8", "half"),
        ("llama", "int6", "half"),
        ("llama", "int5", "threshold"),
        *(("llama", "int4+4", name) for name in ("much", "nothing")),
        ("qwen2", "int4+4", "much"),
        *(("qwen2", "int4", name) for name in ("whole", "threshold", "plain")),
    ],
)
def test_logits_are_the_forwards_but_for_8_bits_of_activations(
    make, token_ids, step_logits, family, weights, conversion
):
    model, ids = make(family, weights, conversion), token_ids(1, LENGTH)
    expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
    found = step_logits(Engine(model, LENGTH), ids, PROMPT)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error[0]) < 0.02  # the prompt runs in the forward itself, up to the head
    # Where entries are selected, another one of 32 may be the last of them.
    least = 5e-5 if weights == "int6" else 1e-4  # that of int6, with its half of the entries, is 1e-4
    assert least < float(error.median()) < (0.03 if conversion == "whole" else 0.15)


class InWholeNumbers(TorchDispatchMode):
    """Computes every product of few bits as its definition in PyTorch says."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.larosa.low_bit_linear.default:
            return low_bit_linear_in_integers(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("weights", "conversion"),
    [
        *(("int8", "whole"), ("int4", "half"), ("int8", "threshold"), ("int4", "plain"), ("int6", "threshold")),
        *(("int4+4", "much"), ("int4+4", "nothing")),
    ],
)
def test_replayed_steps_have_the_bits_of_the_definition(make, token_ids, weights, conversion):
    model, ids = make("llama", weights, conversion, torch.bfloat16), token_ids(1, LENGTH)
    replayed, defined = Engine(model, LENGTH), Engine(model, LENGTH)
    defined._replays = False
    for engine in (replayed, defined):
        engine.prefill(ids[:, :PROMPT])
    for at in range(PROMPT, LENGTH):
        token = ids[0, at : at + 1], torch.tensor([at])
        with InWholeNumbers():
            expected = defined.step(*token)
        assert torch.equal(replayed.step(*token), expected)


def test_whole_weights_have_a_whole_head(make, token_ids, step_logits):
    """With a head that skips much and a decoder that skips nothing, against the forward without thresholds."""
    model, ids = make("llama", "int4+4", "much"), token_ids(1, LENGTH)
    architecture = find_architecture("llama")
    nothing = no_thresholds(SiteSizes.of(model.config), head=True)
    set_thresholds(model, architecture, nothing)
    expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
    head_selector(model, architecture).threshold = 0.1
    engine = Engine(model, LENGTH)
    errors = []
    for weights in (engine.weights, engine.weights.whole()):
        found = step_logits(engine.beside(weights), ids, PROMPT)
        errors.append((found - expected).norm(dim=-1) / expected.norm(dim=-1))
    assert float(errors[0].min()) > 0.1
    assert float(errors[1].max()) < 0.03  # activations have 8 bits


def test_codes_are_neither_kept_twice_nor_widened(make):
    model = make("qwen2", "int4", "half")
    engine = Engine(model, 16)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    sites = [site for layer in engine.weights.layers for site in (layer.h1, layer.h2, layer.h3, layer.h4)]
    linears = [site.linears for site in sites] + [engine.weights._head.linears]
    read = [x for linear in linears for x in (*linear.codes, *linear.scales)]
    assert len(read) == 2 * (3 * 7 + 1)
    assert {x.data_ptr() for x in read} <= own
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 3 * 7 + 1


def test_what_uses_or_saves_the_model_sees_no_other_weights(make, token_ids, tmp_path):
    model, ids = make("llama", "int4", "half"), token_ids(2, 15)
    before = model(ids).logits
    model.save_pretrained(tmp_path / "before")
    Engine(model, 16)
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_counts_of_a_random_model_change_what_is_read(family_config, token_ids):
    layout = Layout(quantization=random_quantization(WeightFormat.INT4, 32))
    prompt, token, position = token_ids(1, 5), torch.tensor([7]), torch.tensor([5])
    for rotation in (Rotation.LAYER, Rotation.NONE):
        model = random_sparse_model(
            family_config("llama"), torch.bfloat16, torch.device("cpu"), layout=layout, rotation=rotation
        )
        logits = []
        for sparsity in (0.0, 0.5):
            set_sparsity(model, sparsity)
            engine = Engine(model, 8)
            engine.prefill(prompt)
            logits.append(engine.step(token, position))
        assert not torch.equal(*logits)
