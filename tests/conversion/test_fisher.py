"""What the Fisher information decides in a conversion, against an own decoder and its own gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import larosa
from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import SITES, PerSite
from larosa.models import selectors, set_keep_counts
from larosa.sparsity import SiteSizes, keep_counts
from larosa.sparsity.sensitivity import cheapest

from .reference import PLAIN, ROTATIONS, VARIANTS, Reference, calibration_ids, plain, relative_error

FISHER = {"score": "fisher", "value_rotation": True, "rotation_objective": "fisher"}


class FisherReference(Reference):
    """The reference of the equations, with scores and bases from the gradients of a loss that it draws itself."""

    def observe(self, sequences, seed):
        """mean(x^T x) and mean(g^T g) at each site, of inputs and gradients of -log p of tokens drawn from p."""
        generator = torch.Generator().manual_seed(seed)
        embedding = self.weights["model.embed_tokens.weight"].requires_grad_()
        self.C, self.H = {}, {}
        for ids in sequences:
            self.moments = {}
            logits = self(ids)
            chances = torch.rand(len(ids), 1, generator=generator, dtype=torch.float64)
            drawn = (logits.softmax(-1).cumsum(-1) <= chances).sum(-1)
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            rows = [x for (x,) in self.moments.values()]
            for at, x, g in zip(self.moments, rows, torch.autograd.grad(loss, rows), strict=True):
                x = x.detach()
                self.C[at] = self.C.get(at, 0) + x.T @ x / sequences.numel()
                self.H[at] = self.H.get(at, 0) + g.T @ g / sequences.numel()
        embedding.requires_grad_(False)

    def rotate(self, rotation, groups=((0,), (1,), (2,))):
        """Eigenvectors of C / tr C + H / tr H, summed over a group's layers, and of the same for each value head."""

        def basis(*pairs):
            return torch.linalg.eigh(sum(C / C.trace() + H / H.trace() for C, H in pairs))[1]

        size = self.config.hidden_size // self.config.num_attention_heads
        group_size = self.config.num_attention_heads // self.config.num_key_value_heads
        for i in self.layers:
            for site in ("h1", "h3"):
                sources = {"block": [site], "layer": ["h1", "h3"]}[rotation]
                (group,) = (group for group in groups if i in group)
                self.bases[i, site] = basis(*([sum(M[j, s] for s in sources) for M in (self.C, self.H)] for j in group))
            blocks = []
            for first in range(0, self.config.num_attention_heads, group_size):
                heads = [slice(n * size, (n + 1) * size) for n in range(first, first + group_size)]
                shared = (sum(M[i, "h2"][head, head] for head in heads) for M in (self.C, self.H))
                blocks += [basis(shared)] * group_size
            self.bases[i, "h2"] = torch.block_diag(*blocks)

    def moved(self, i, site, direction):
        """How far the predictions move with a step in a direction of a site's input."""
        return (direction @ self.H[i, site] @ direction).sqrt()


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("keys", [2, 4], ids=["gqa", "mha"])
@pytest.mark.parametrize("rotation", ["layer", "block"])
def test_equals_the_equations(make_model, quick_convert, token_ids, text_file, tokenizer, family, keys, rotation):
    model = make_model(family, torch.float64, num_key_value_heads=keys, **plain(family))
    reference, ids = FisherReference(model, scored=True), token_ids(20, seed=5)
    reference.observe(calibration_ids(text_file, tokenizer)[calibration_order(4, 2)], 2)
    reference.rotate(rotation)
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(model, rotation=rotation, seed=2, search="none", **FISHER)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
def test_layers_that_share_a_rotation_keep_scores_and_values_of_their_own(
    make_model, quick_convert, token_ids, text_file, tokenizer
):
    model = make_model("llama", torch.float64, **plain("llama"))
    reference, ids = FisherReference(model, scored=True), token_ids(20, seed=5)
    reference.observe(calibration_ids(text_file, tokenizer)[calibration_order(4, 2)], 2)
    reference.rotate("layer", groups=((0,), (1, 2)))
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(model, layers_per_rotation=2, seed=2, search="none", **FISHER)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


def calibration_order(count, seed):
    """The order in which calibration takes windows, which decides which token is drawn where."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("options", [{"method": "topk"}, {"rotation": "none", "value_rotation": False}])
def test_scores_without_a_rotation(make_model, quick_convert, token_ids, text_file, tokenizer, options):
    model = make_model("llama", torch.float64)
    reference, ids = FisherReference(model, rotated=False, scored=True), token_ids(20, seed=5)
    reference.observe(calibration_ids(text_file, tokenizer)[calibration_order(4, 0)], 0)
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(model, score="fisher", search="none", **options)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.one_of(3)
def test_exact_at_zero_sparsity(make_model, quick_convert, token_ids, family, overrides, rotation):
    model, ids = make_model(family, torch.float64, **overrides), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, search="fisher", **FISHER)
    assert relative_error(converted(ids).logits, expected) < 1e-10


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_search_drops_what_the_scores_say_costs_least(make_model, quick_convert, family):
    model = quick_convert(make_model(family), search="fisher", sparsity=0.4, **FISHER)
    block, sizes, architecture = model.config.larosa, SiteSizes.of(model.config), find_architecture(family)
    assert (block["search"], block["score"], block["alphas"]) == ("fisher", "fisher", None)
    for site, found in selectors(model, architecture).items():
        assert [selector.k for selector in found] == block["keep"][site]
    skipped = sizes.skipped_weights({site: [sizes.width[site] - k for k in block["keep"][site]] for site in SITES})
    assert 0.4 - 0.01 < skipped / sizes.linear_weights <= 0.4
    assert larosa.inspect(model).score_bytes == 4 * sizes.score_entries
    even = keep_counts(0.4, PerSite(), sizes)
    assert all(block["keep"][site] != even[site] for site in SITES)


def test_the_search_prices_entries_by_scores_and_coherence(make_model, quick_convert, text_file, tokenizer):
    model = quick_convert(make_model("llama", torch.float64), search="fisher", sparsity=0.4, **FISHER)
    sizes, architecture = SiteSizes.of(model.config), find_architecture("llama")
    found = model.config.larosa["keep"]
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), sizes))
    seen = {}
    for site, sites in selectors(model, architecture).items():
        for layer, selector in enumerate(sites):
            selector.register_forward_pre_hook(lambda _, x, at=(layer, site): seen.update({at: x[0]}))
    model(calibration_ids(text_file, tokenizer))
    costs = {}
    for (layer, site), x in sorted(seen.items()):
        score = selectors(model, architecture)[site][layer].score.double()
        linears = architecture.linears(architecture.layers(model)[layer], site)
        x, W = x.flatten(0, 1), torch.cat([linear.weight for linear in linears])
        order = (x * score).abs().argsort(-1)
        dropped = x.scatter(-1, order[:, x.shape[1] // 2 :], 0)
        apart = (dropped[:, None] * W).square().sum()  # each product on its own
        together = torch.einsum("td,nd->tn", dropped, W).square().sum()
        costs[layer, site] = (x * score).square().sort(-1).values.mean(0) * together / apart
    expected = cheapest(0.4, sizes, costs)
    # Rounding decides between entries of nearly equal prices.
    assert all(abs(k - other) <= 1 for site in SITES for k, other in zip(expected[site], found[site], strict=True))


def test_errors_that_add_up_are_priced(make_model, quick_convert):
    """Where positive entries all write in one direction their errors add up; with alternating signs they cancel."""

    def kept(signs):
        model = make_model("llama")
        mlp = model.model.layers[1].mlp
        with torch.no_grad():
            mlp.up_proj.weight.copy_(mlp.gate_proj.weight)  # silu(z) z is positive
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, :1] * signs)
        return quick_convert(model, search="fisher", sparsity=0.4, **FISHER).config.larosa["keep"]["h4"][1]

    assert kept(torch.ones(56)) > kept(1 - 2 * (torch.arange(56) % 2.0)) + 5


def test_saves_and_loads(make_model, quick_convert, token_ids, tmp_path):
    model, ids = quick_convert(make_model("llama", torch.bfloat16), search="fisher", **FISHER), token_ids(2, 15)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.larosa == model.config.larosa
    for site, found in selectors(loaded, find_architecture("llama")).items():
        for selector, before in zip(found, selectors(model, find_architecture("llama"))[site], strict=True):
            assert torch.equal(selector.score, before.score)
    assert relative_error(loaded(ids).logits.detach().float(), model(ids).logits.float()) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "fisher", "score": "weights"}, "add --score fisher"),
        ({"search": "fisher", "score": "fisher", "budget": "paper"}, "add --budget weights"),
        ({"method": "teal", "score": "fisher"}, "--score fisher does not apply to method teal"),
    ],
)
def test_refuses_what_does_not_go_together(make_model, quick_convert, options, message):
    with pytest.raises(LarosaError, match=message):
        quick_convert(make_model("llama"), **options)


def test_parts_can_be_had_alone(make_model, quick_convert):
    outputs = quick_convert(make_model("llama"), **{**PLAIN, "rotation_objective": "outputs"}).state_dict()
    fisher = quick_convert(make_model("llama"), **{**PLAIN, "rotation_objective": "fisher"}).state_dict()
    assert outputs.keys() == fisher.keys()
    assert not torch.allclose(outputs["model.embed_tokens.weight"], fisher["model.embed_tokens.weight"])
