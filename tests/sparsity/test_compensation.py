import pytest
import torch
from tests.conversion.reference import calibration_ids
from transformers import AutoModelForCausalLM

from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import SITES, KeepCounts, PerSite
from larosa.models import selectors, set_keep_counts
from larosa.ops import keep_top_k
from larosa.sparsity import SiteSizes, keep_counts

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def refitted(model, architecture, sequences):
    """Each linear's weights by ordinary least squares, D rows of the mean square of an entry standing for no change."""
    keep = KeepCounts(**model.config.larosa["keep"])
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), SiteSizes.of(model.config)))
    seen = {}
    for site, found in selectors(model, architecture).items():
        for layer, selector in enumerate(found):
            selector.register_forward_pre_hook(
                lambda _s, x, at=(layer, site): seen.setdefault(at, []).append(x[0].flatten(0, -2)) or None
            )
    for row in sequences:
        model(row[None])
    expected = {}
    for (index, site), rows in seen.items():
        x, selector = torch.cat(rows), selectors(model, architecture)[site][index]
        s = keep_top_k(x, keep[site][index], selector.score)
        width = x.shape[1]
        prior = torch.eye(width).double() * (s.square().mean() * width).sqrt()
        A = torch.linalg.lstsq(torch.cat([s, prior]), torch.cat([x - s, torch.zeros_like(prior)])).solution
        for number, linear in enumerate(architecture.linears(architecture.layers(model)[index], site)):
            expected[index, site, number] = (torch.eye(width).double() + A).T, linear.weight
    return {at: W @ B for at, (B, W) in expected.items()}


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"rotation": "block"}, {"layers_per_rotation": 2}, {"method": "topk"}],
    ids=["larosa", "block", "shared", "topk"],
)
@pytest.mark.one_of(3)
def test_equals_least_squares(make_model, quick_convert, text_file, tokenizer, family, options):
    architecture = find_architecture(family)
    model = quick_convert(make_model(family, torch.float64), compensation="linear", **options)
    plain = quick_convert(make_model(family, torch.float64), **options)
    assert plain.config.larosa["keep"] == model.config.larosa["keep"]
    # Sums do not mind the order in which calibration takes the windows.
    for (index, site, number), weight in refitted(plain, architecture, calibration_ids(text_file, tokenizer)).items():
        linear = architecture.linears(architecture.layers(model)[index], site)[number]
        torch.testing.assert_close(linear.weight.data, weight, rtol=1e-9, atol=1e-10)
    for name, tensor in plain.state_dict().items():
        if "_proj.weight" not in name:
            assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_nothing_at_zero_sparsity(make_model, quick_convert, family):
    plain = quick_convert(make_model(family), sparsity=0.0).state_dict()
    model = quick_convert(make_model(family), sparsity=0.0, compensation="linear").state_dict()
    assert all(torch.equal(weight, model[name]) for name, weight in plain.items())


def test_runs_by_its_counts_and_comes_back(make_model, quick_convert, token_ids, tmp_path):
    model, ids = quick_convert(make_model("llama"), sparsity=0.4, compensation="linear"), token_ids(2, 15)
    for site in SITES:
        counts = [selector.k for selector in selectors(model, find_architecture("llama"))[site]]
        assert counts == model.config.larosa["keep"][site]
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").requires_grad_(False)
    assert loaded.config.larosa["compensation"] == "linear"
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "dense"}, "leave --prefill dense out"),
        ({"method": "teal"}, "--compensation linear does not apply to method teal"),
    ],
)
def test_refuses_what_it_cannot_make_up_for(make_model, quick_convert, options, message):
    with pytest.raises(LarosaError, match=message):
        quick_convert(make_model("llama"), compensation="linear", **options)
