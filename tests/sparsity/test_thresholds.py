import dataclasses
import statistics

import pytest
import torch
from transformers import LlamaConfig

from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import Method
from larosa.sparsity import SiteSizes
from larosa.sparsity.thresholds import calibrate_thresholds, uniform_shares

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ALL = ("h1", "h2", "h3", "h4", "gate")


def magnitudes_by_hand(model, sequences):
    """Run the whole dense model and keep what every linear reads, and the activated gate."""
    seen = {}

    def keep(layer, site):
        return lambda _module, inputs: seen.setdefault((layer, site), []).append(inputs[0])

    hooks = []
    for index, layer in enumerate(model.model.layers):
        for site, linear in (
            ("h1", layer.self_attn.v_proj),
            ("h2", layer.self_attn.o_proj),
            ("h3", layer.mlp.up_proj),
            ("h4", layer.mlp.down_proj),
        ):
            hooks.append(linear.register_forward_pre_hook(keep(index, site)))
        hooks.append(
            layer.mlp.gate_proj.register_forward_hook(
                lambda _module, _inputs, output, index=index: seen.setdefault((index, "gate"), []).append(
                    torch.nn.functional.silu(output)
                )
            )
        )
    for row in sequences:
        model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {at: sorted(torch.cat(x).abs().flatten().tolist()) for at, x in seen.items()}


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_thresholds_are_the_quantiles_of_all_calibration_tokens(make_model, token_ids, family, dtype):
    model, ids = make_model(family, dtype), token_ids(3, 20)
    by_hand = magnitudes_by_hand(model, ids)
    shares = dict(zip(ALL, (0.5, 0.25, 0.0, 0.9, 1.0), strict=True))
    found = calibrate_thresholds(
        model, find_architecture(family), ids, torch.device("cpu"), ALL, lambda visit, magnitudes: shares
    )
    for (layer, site), values in by_hand.items():
        rank = round(shares[site] * len(values))
        expected = values[rank - 1] if rank else 0.0
        if dtype is torch.bfloat16:  # one rounding of a hidden state may shift every entry behind it
            assert found[site][layer] == pytest.approx(expected, rel=0.02, abs=0.01)
        else:
            assert found[site][layer] == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 1e-12)
            # Under GQA the first token's h2 holds each value once per query head: exact ties go together.
            at_most = sum(v <= expected * (1 + 1e-5) for v in values)
            assert rank <= round(found.dropped[site][layer] * len(values)) <= at_most


def test_leaves_the_model_as_it_was(make_model, token_ids):
    model, ids = make_model("qwen2"), token_ids(2, 20)
    before = model(ids).logits
    shares = dict.fromkeys(ALL, 0.5)
    calibrate_thresholds(
        model, find_architecture("qwen2"), ids, torch.device("cpu"), ALL, lambda visit, magnitudes: shares
    )
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_names_the_place_of_bad_activations(make_model, token_ids):
    model = make_model("llama")
    model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(LarosaError, match="layer 1, site gate"):
        calibrate_thresholds(
            model,
            find_architecture("llama"),
            token_ids(2, 8),
            torch.device("cpu"),
            ("gate",),
            lambda visit, magnitudes: {"gate": 0.5},
        )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


LLAMA3_8B = SiteSizes.of(
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.4, 0.5, 0.53])
def test_cats_reaches_the_models_target_with_up_and_down_alone(sparsity):
    shares = uniform_shares(Method.CATS, sparsity, LLAMA3_8B)
    assert list(shares) == ["gate"]
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    matrix = 4096 * 14336
    assert shares["gate"] * 2 * matrix / (attention + 3 * matrix) == pytest.approx(sparsity)


@pytest.mark.parametrize("sparsity", [2 * 4096 * 14336 / (2 * 4096 * 5120 + 3 * 4096 * 14336), 0.54, 0.9])
def test_beyond_the_reach_of_cats(sparsity):
    with pytest.raises(LarosaError, match=r"CATS skips only up and down: at most 53\.8% of this model's weights"):
        uniform_shares(Method.CATS, sparsity, LLAMA3_8B)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_teal_drops_the_same_everywhere(sparsity):
    assert uniform_shares(Method.TEAL, sparsity, LLAMA3_8B) == dict.fromkeys(("h1", "h2", "h3", "h4"), sparsity)


def test_a_family_without_a_gate_says_so():
    architecture = dataclasses.replace(find_architecture("llama"), gate_activation_name=None)
    with pytest.raises(LarosaError, match="model type 'llama' has no gated MLP, which method cats needs"):
        architecture.check_site("gate")
    architecture.check_site("h4")


def test_thresholds_differ_between_layers(make_model, token_ids):
    # Guards against one layer's magnitudes leaking into the next one's.
    found = calibrate_thresholds(
        make_model("llama"),
        find_architecture("llama"),
        token_ids(2, 20),
        torch.device("cpu"),
        ("h4",),
        lambda visit, magnitudes: {"h4": 0.5},
    )
    assert statistics.pstdev(found["h4"]) > 0
    assert found.dropped["h4"] == [0.5] * 3
