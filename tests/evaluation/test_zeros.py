import pytest
import torch

from larosa.config import SITES
from larosa.evaluation.zeros import ZeroCounter, sparse_prompts


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shares_are_one_minus_k_over_width(make_model, quick_convert, token_ids, family, sparsity):
    model = quick_convert(make_model(family), sparsity=sparsity)
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
