"""Thresholds that follow from one price of a weight, against sums taken by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples
from transformers import AutoModelForCausalLM

import larosa
from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import SITES
from larosa.conversion import ConversionOptions, sparsify
from larosa.evaluation.zeros import ZeroCounter
from larosa.models import Threshold, head_selector, selectors, set_thresholds
from larosa.models.selectors import DenseTokens
from larosa.sparsity import SiteSizes
from larosa.sparsity.prices import Histogram, no_thresholds

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@pytest.fixture
def sparsified(make_model, token_ids):
    """sparsified(family, sparsity, dtype, **settings): a tiny model with thresholds, calibrated on `calibration`."""

    def make(family, sparsity, dtype=torch.float32, **options):
        options = {"dense_first_token": False, "num_sequences": 16, "sequence_length": 40} | options
        chosen = ConversionOptions(sparsity=sparsity, selection="threshold", **options).complete()
        return sparsify(make_model(family, dtype), None, chosen, sequences=calibration(token_ids))

    return make


def calibration(token_ids):
    return token_ids(16, 40, seed=3)


def skipped(model, ids):
    with ZeroCounter(model) as zeros:
        model(ids)
    return zeros.actual_sparsity()


@pytest.mark.parametrize("rotation", ["none", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.one_of(7)
def test_the_budget_is_met_on_the_sparse_path(sparsified, token_ids, family, rotation):
    converted = sparsified(family, 0.5, rotation=rotation)
    for sparsity in (0.5, 0.25, 0.7):
        converted.set_sparsity(sparsity)
        found = skipped(converted.model, calibration(token_ids))
        assert found.mean == pytest.approx(sparsity, abs=0.01)
        assert found.std > 0.003  # tokens differ
        assert larosa.inspect(converted.model).sparsity.weights == pytest.approx(sparsity, abs=1e-3)


def test_a_sparsity_that_a_search_comes_back_to_is_calibrated_once(sparsified):
    converted = sparsified("llama", 0.5)
    passes = []
    converted.model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    converted.set_sparsity(0.25)
    once, first = len(passes), converted.model.config.larosa
    converted.set_sparsity(0.7)
    assert len(passes) == 2 * once > 0
    converted.set_sparsity(0.25)
    assert len(passes) == 2 * once
    assert converted.model.config.larosa == first
    selector = selectors(converted.model, find_architecture("llama"))["h1"][0]
    assert selector.threshold == first["thresholds"]["values"]["h1"][0]


def test_all_sites_pay_one_price(sparsified, token_ids):
    converted = sparsified("llama", 0.4, torch.float64)
    model, architecture = converted.model, find_architecture("llama")
    sizes, thresholds = SiteSizes.of(model.config), model.config.larosa["thresholds"]["values"]
    set_thresholds(model, architecture, no_thresholds(sizes))
    seen = {}
    for site, of_site in selectors(model, architecture).items():
        for layer, selector in enumerate(of_site):
            selector.register_forward_pre_hook(lambda s, x, at=(layer, site): seen.update({at: (x[0], s.score)}))
    model(calibration(token_ids))
    prices = []
    for (layer, site), (x, score) in seen.items():
        linears = architecture.linears(architecture.layers(model)[layer], site)
        x, W = x.flatten(0, 1), torch.cat([linear.weight for linear in linears])
        order = (x * score).abs().argsort(-1)
        dropped = x.scatter(-1, order[:, x.shape[1] // 2 :], 0)
        apart = (dropped[:, None] * W).square().sum()
        coherence = torch.einsum("td,nd->tn", dropped, W).square().sum() / apart
        prices.append(thresholds[site][layer] ** 2 * float(coherence) / sizes.outputs[site])
    assert len(prices) == 3 * len(SITES)
    assert max(prices) == pytest.approx(min(prices), rel=1e-3)


def test_a_head_in_planes_pays_the_price_of_the_decoder(sparsified):
    """Its scores have the coherence in them; and a sparsity is of the decoder alone."""
    before = sparsified("llama", 0.4)
    converted = before.stored(ConversionOptions(weights="int4+4", weight_group=32).complete().quantization)
    sizes, heads = SiteSizes.of(converted.model.config), []
    for sparsity in (0.5, 0.7):
        converted.set_sparsity(sparsity)
        assert larosa.inspect(converted.model).sparsity.weights == pytest.approx(sparsity, abs=1e-3)
        thresholds = converted.model.config.larosa["thresholds"]
        heads.append(thresholds["head"]["dropped"])
        root = thresholds["head"]["value"] / sizes.outputs["head"] ** 0.5
        for site in SITES:
            for layer, value in enumerate(thresholds["values"][site]):
                scale = converted.limits._scale[layer, site]
                assert value == pytest.approx(root * scale, rel=1e-6)
        assert head_selector(converted.model, find_architecture("llama")).threshold == thresholds["head"]["value"]
    assert 0 < heads[0] < heads[1] < 1
    converted.set_sparsity(0)
    assert converted.model.config.larosa["thresholds"]["head"] == {"value": 0, "dropped": 0}
    assert head_selector(converted.model, find_architecture("llama")).threshold == 0


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("rotation", ["none", "layer", "block"])
def test_exact_at_zero_sparsity(make_model, sparsified, token_ids, rotation):
    ids = token_ids(2, 24)
    expected = make_model("qwen3", torch.float64)(ids).logits
    found = sparsified("qwen3", 0.0, torch.float64, rotation=rotation).model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_first_token_stays_dense_and_does_not_count(make_model, sparsified, token_ids):
    converted = sparsified("llama", 0.5, dense_first_token=True)
    with ZeroCounter(converted.model) as zeros:
        converted.model(calibration(token_ids))
    rest = zeros.actual_sparsity().mean
    assert rest == pytest.approx(0.5, abs=0.02)


def test_saves_and_loads(sparsified, token_ids, tmp_path):
    model, ids = sparsified("llama", 0.5, torch.bfloat16).model, token_ids(2, 15)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.larosa == model.config.larosa
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_compensation_is_refused():
    with pytest.raises(LarosaError, match="leave --selection threshold out"):
        ConversionOptions(sparsity=0.5, selection="threshold", compensation="linear").complete()


@settings(max_examples=examples(60))
@given(st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=40), st.floats(0, 2.0**120, width=32))
def test_histograms_are_right_to_within_a_bin(values, magnitude):
    x = torch.tensor(values)
    histogram = Histogram(Threshold(0.0, DenseTokens()), [])
    histogram(None, (x[None, None] * torch.where(torch.arange(len(x)) % 2 == 0, 1, -1),))
    near = max(magnitude * 2**-7, 1e-37)  # the smallest bins are of denormal numbers
    share = histogram.below(magnitude)
    assert float((x < magnitude - near).double().mean()) <= share + 1e-9
    assert share - 1e-9 <= float((x <= magnitude + near).double().mean())
    assert histogram.quantile(1.0) <= float(x.max()) * (1 + 2**-7) + 1e-37
    if 0 < share < 1:
        assert histogram.below(histogram.reaching(share)) == pytest.approx(share, abs=1e-4)
