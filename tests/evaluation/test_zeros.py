import pytest
import torch

import larosa
from larosa.config import SITES
from larosa.evaluation.zeros import Spread, ZeroCounter, sparse_prompts


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shares_are_one_minus_k_over_width(make_model, quick_convert, token_ids, family, sparsity):
    model = quick_convert(make_model(family), sparsity=sparsity, search="none")
    with ZeroCounter(model) as zeros:
        model(token_ids(3, 13))
    widths = {"h1": 32, "h2": 64 if family == "qwen3" else 32, "h3": 32, "h4": 56}
    for site in SITES:
        share = 1 - model.config.larosa["keep"][site][0] / widths[site]
        fraction = zeros.fractions()[site]
        assert (fraction.min, fraction.mean, fraction.max) == pytest.approx((share, share, share))


def test_mean_and_extremes_over_layers_and_tokens(make_model, quick_convert, token_ids):
    model = quick_convert(make_model("llama"), sparsity=0.5)
    for layer, k in zip(model.model.layers, (4, 8, 32), strict=True):
        layer.h1.k = k
    with ZeroCounter(model) as zeros:
        model(token_ids(2, 5))
        model(token_ids(1, 9))
    fraction = zeros.fractions()["h1"]
    expected = (0, (28 / 32 + 24 / 32 + 0) / 3, 28 / 32)
    assert (fraction.min, fraction.mean, fraction.max) == pytest.approx(expected)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.77])
def test_every_token_of_topk_skips_exactly_what_the_configuration_promises(
    make_model, quick_convert, token_ids, sparsity
):
    model = quick_convert(make_model("qwen3"), sparsity=sparsity, rotation="model")
    with ZeroCounter(model) as zeros:
        model(token_ids(3, 13))
        model(token_ids(1, 5))
    promised = larosa.inspect(model).sparsity.weights
    assert zeros.skipped().tolist() == [promised] * (3 * 13 + 5)
    spread = zeros.actual_sparsity()
    assert (spread.min, spread.max) == (promised, promised)
    assert (spread.mean, spread.std) == (pytest.approx(promised), pytest.approx(0, abs=1e-12))


def test_skipped_weights_of_each_token_by_hand_for_teal(make_model, quick_convert, token_ids):
    model, ids = quick_convert(make_model("llama"), method="teal", sparsity=0.4), token_ids(2, 7)
    zeros_of, readers = {}, {}
    for layer in model.model.layers:
        for module in (layer.h1, layer.self_attn.o_proj.selector, layer.h3, layer.mlp.down_proj.selector):
            module.register_forward_hook(lambda m, _x, y: zeros_of.update({m: (y == 0).sum(-1).flatten()}))
        attention, mlp = layer.self_attn, layer.mlp
        readers[layer.h1] = [attention.q_proj, attention.k_proj, attention.v_proj]
        readers[attention.o_proj.selector] = [attention.o_proj]
        readers[layer.h3] = [mlp.gate_proj, mlp.up_proj]
        readers[mlp.down_proj.selector] = [mlp.down_proj]
    with ZeroCounter(model) as zeros:
        model(ids)
    skipped = sum(zeros_of[m] * linear.out_features for m in readers for linear in readers[m])
    total = sum(linear.weight.numel() for linears in readers.values() for linear in linears)
    assert zeros.skipped().tolist() == (skipped.double() / total).tolist()
    assert zeros.actual_sparsity().max == float(skipped.max()) / total


def test_skipped_weights_of_each_token_by_hand_for_cats(make_model, quick_convert, token_ids):
    model, ids = quick_convert(make_model("llama"), method="cats", sparsity=0.3), token_ids(2, 7)
    seen = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _m, _x, y: seen.append((y == 0).sum(-1).flatten()))
    with ZeroCounter(model) as zeros:
        model(ids)
    # Each zero skips a row of up and a column of down.
    total = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 56)
    assert zeros.skipped().tolist() == (sum(seen).double() * 2 * 32 / total).tolist()


def test_spread():
    spread = Spread.of(torch.tensor([[0.25, 0.5], [0.75, 1.0]]))
    assert (spread.mean, spread.min, spread.max) == (0.625, 0.25, 1.0)
    assert spread.std == pytest.approx(0.078125**0.5)
    assert f"{spread:.1%}" == "62.5% (min 25.0%, max 100.0%)"


def test_counts_natural_zeros_too(make_model, quick_convert, token_ids):
    model = quick_convert(make_model("llama"), sparsity=0.0, rotation="none")
    model.model.layers[1].input_layernorm.weight[:8] = 0
    with ZeroCounter(model) as zeros:
        model(token_ids(2, 5))
    assert zeros.fractions()["h1"].max == 8 / 32
    assert zeros.fractions()["h1"].min == 0


def test_stops_counting_when_closed(make_model, quick_convert, token_ids):
    model = quick_convert(make_model("llama"))
    with ZeroCounter(model) as zeros:
        model(token_ids(1, 5))
    before = zeros.fractions()
    model.model.layers[0].h1.k = 1
    model(token_ids(1, 5))
    assert zeros.fractions() == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dense_model_has_nothing_to_count(make_model, token_ids):
    model = make_model("llama")
    with ZeroCounter(model) as zeros:
        model(token_ids(1, 5))
    assert zeros.fractions() is None
    assert zeros.actual_sparsity() is None
    assert zeros.zeros() == {}


def test_prompts_are_sparse_only_for_the_time_being(make_model, quick_convert, token_ids):
    sparse = quick_convert(make_model("llama"), prefill="sparse")
    model, ids = quick_convert(make_model("llama"), prefill="dense"), token_ids(1, 12)
    dense_logits = model(ids).logits
    with sparse_prompts(model):
        assert torch.equal(model(ids).logits, sparse(ids).logits)
    assert torch.equal(model(ids).logits, dense_logits)


def test_prompts_are_dense_again_after_an_error(make_model, quick_convert, token_ids):
    model, ids = quick_convert(make_model("llama"), prefill="dense"), token_ids(1, 12)
    before = model(ids).logits
    with pytest.raises(KeyboardInterrupt), sparse_prompts(model):
        raise KeyboardInterrupt
    assert torch.equal(model(ids).logits, before)
