"""What the benchmarks on a GPU compare with computes what it should; on a CPU here, and small."""

import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from larosa.benchmarks.compiled_decoder import (
    CompiledDecoder,
    attend_at_once,
    attend_by_products,
    compilation,
    compiled_step,
)
from larosa.benchmarks.int4_kernel import GROUP, GemliteProducts, Int4Products, gemlite_products, int4_products

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 12


def config(**overrides):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**sizes, **overrides})


def as_transformers(decoder, settings):
    """The same weights in transformers' model."""
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval().requires_grad_(False)
    model.model.embed_tokens.weight.copy_(decoder.embedding)
    model.lm_head.weight.copy_(decoder.head.weights[0])
    for layer, own in zip(model.model.layers, decoder.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        joined = [attention.q_proj, attention.k_proj, attention.v_proj]
        parts = own.products["h1"].weights[0].split([linear.out_features for linear in joined])
        for linear, part in zip(joined, parts, strict=True):
            linear.weight.copy_(part)
        gate, up = own.products["h3"].weights
        for linear, weight in (
            (attention.o_proj, own.products["h2"].weights[0]),
            (mlp.gate_proj, gate),
            (mlp.up_proj, up),
            (mlp.down_proj, own.products["h4"].weights[0]),
        ):
            linear.weight.copy_(weight)
    return model


@torch.no_grad()
@pytest.mark.parametrize("attention", [attend_at_once, attend_by_products])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_the_plain_decoder_is_the_model_of_transformers(key_heads, attention):
    torch.manual_seed(0)
    settings = config(num_key_value_heads=key_heads)
    decoder = CompiledDecoder(settings, LENGTH, torch.float32, CPU)
    tokens = torch.randint(96, (LENGTH,))
    expected = as_transformers(decoder, settings)(tokens[None]).logits[0]
    for position in range(LENGTH):
        logits = decoder(tokens[position : position + 1], torch.tensor([position]), attention)
        torch.testing.assert_close(logits[0], expected[position], rtol=1e-4, atol=1e-4)


def test_attention_is_chosen_where_queries_share_keys():
    ways = {
        heads: CompiledDecoder(config(num_key_value_heads=heads), 2, torch.float32, CPU).attentions for heads in (4, 2)
    }
    assert ways == {4: (attend_at_once,), 2: (attend_at_once, attend_by_products)}


@pytest.mark.skipif(
    DEVICE == CPU and not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="PyTorch's compiler wants Python's headers",
)
@pytest.mark.parametrize(
    ("attention", "opaque"), [(attend_at_once, False), (attend_by_products, False), (attend_by_products, True)]
)
@torch.no_grad()
@pytest.mark.one_of(3)
def test_the_compiled_step_is_the_decoder(attention, opaque, capsys):
    decoder = CompiledDecoder(config(), LENGTH, torch.float32, DEVICE)
    step = compiled_step(decoder, attention, opaque)
    token = torch.tensor([3], device=DEVICE)
    with compilation():
        for position in range(LENGTH):
            at = torch.tensor([position], device=DEVICE)
            assert torch.equal(step(token, at), decoder(token, at, attention).argmax(-1))
    assert "autotune" not in capsys.readouterr().err.lower()


def teal():
    pytest.importorskip("triton")
    from larosa.benchmarks import teal_kernel

    return teal_kernel


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 100), (300, 33), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_threshold_kernel_reads_what_exceeds_the_threshold(outputs, inputs, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(1, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    for threshold in (0.0, 0.7, 100.0):
        kept = torch.where(x.abs() > threshold, x, 0).double()
        result = teal().threshold_linear(x.to(DEVICE), weight.t().contiguous().to(DEVICE), threshold, 32, 16, 4)
        torch.testing.assert_close(result.cpu().double(), kept @ weight.double().t(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_thresholds_leave_out_the_share_asked_for():
    torch.manual_seed(0)
    kernel = teal()
    decoder = CompiledDecoder(config(), LENGTH, torch.float32, DEVICE, kernel.threshold_products({}))
    token, position = torch.tensor([3], device=DEVICE), torch.tensor([0], device=DEVICE)
    dense = decoder(token, position)
    kernel.set_thresholds(decoder, 0.5, token, position)
    assert not torch.allclose(decoder(token, position), dense)
    first = decoder.layers[0].products["h1"]
    assert (first.last.abs() <= first.threshold).float().mean().item() == pytest.approx(0.5, abs=0.02)
    kernel.set_thresholds(decoder, 0.0, token, position)
    torch.testing.assert_close(decoder(token, position), dense)


@pytest.mark.gpu
def test_the_int4_kernel_multiplies_with_its_codes():
    torch.manual_seed(0)
    products = Int4Products([torch.empty(64, 1024, dtype=torch.bfloat16, device=DEVICE)])
    torch.manual_seed(0)
    codes = torch.randint(256, (64, 512), dtype=torch.uint8, device=DEVICE)
    weight = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).double() - 8
    scale = products.scales_0[..., 0].double().t().repeat_interleave(GROUP, dim=1)
    x = torch.randn(1, 1024, dtype=torch.bfloat16, device=DEVICE)
    torch.testing.assert_close(products(x)[0].double(), x.double() @ (weight * scale).t(), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [256, 1024])
def test_gemlite_multiplies_with_its_codes(inputs):
    pytest.importorskip("gemlite")
    torch.manual_seed(0)
    products = GemliteProducts([torch.empty(128, inputs, dtype=torch.bfloat16, device=DEVICE)])
    torch.manual_seed(0)
    codes = torch.randint(16, (128, inputs), dtype=torch.uint8, device=DEVICE)
    x = torch.randn(1, inputs, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.tensor(0.2 * inputs**-0.5, dtype=torch.bfloat16).item()
    expected = x.double() @ (codes.double() - 8).t() * scale
    torch.testing.assert_close(products(x)[0].double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("products", [int4_products, gemlite_products])
@torch.no_grad()
def test_the_decoder_compiles_with_int4_products(products):
    if products is gemlite_products:
        pytest.importorskip("gemlite")
    settings = config(hidden_size=256, intermediate_size=512, head_dim=64)
    decoder = CompiledDecoder(settings, LENGTH, torch.bfloat16, DEVICE, products, products)
    token, at = torch.tensor([3], device=DEVICE), torch.tensor([0], device=DEVICE)
    logits = decoder(token, at)
    assert logits.shape == (1, 96)
    with compilation():
        chosen = compiled_step(decoder, opaque=True)(token, at)
    assert float(logits[0, chosen[0]]) >= float(logits.max()) - 0.05  # rounded otherwise in bfloat16
