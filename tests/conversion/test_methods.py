"""TopK, TEAL and CATS against plain references: masks written as hooks on the dense transformers model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import larosa
from larosa import LarosaError
from larosa.architectures import cache_argument, find_architecture
from larosa.config import SITES
from larosa.evaluation.zeros import ZeroCounter
from larosa.models import selectors
from larosa.sparsity import SiteSizes

from .reference import calibration_ids, relative_error

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
#: Of the tiny models' weights, what CATS can skip is about a half.
OPTIONS = {
    "topk": {"sparsity": 0.5},
    "teal": {"sparsity": 0.5},
    "teal-greedy": {"sparsity": 0.2, "search": "greedy"},  # whose search takes steps in proportion
    "cats": {"sparsity": 0.3},
}


def options_of(name):
    return {"method": name.partition("-")[0], **OPTIONS[name]}


def linears(layer):
    """Every linear of a dense layer, with its site."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *((linear, "h1") for linear in (attention.q_proj, attention.k_proj, attention.v_proj)),
        (attention.o_proj, "h2"),
        (mlp.gate_proj, "h3"),
        (mlp.up_proj, "h3"),
        (mlp.down_proj, "h4"),
    ]


def quantile(rows, share):
    values = torch.cat([row.flatten() for row in rows]).abs().sort().values
    rank = round(share * len(values))
    return float(values[rank - 1]) if rank else 0.0


def add_teal(model, sequences, shares):
    """TEAL by its definition: quantiles of what each linear reads, then masks on what each linear reads."""
    seen = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _m, x, at=(index, site): seen.setdefault(at, []).append(x[0]))
        for index, layer in enumerate(model.model.layers)
        for linear, site in linears(layer)
    ]
    for row in sequences:
        model(row[None])
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(model.model.layers):
        for linear, site in linears(layer):
            t = quantile(seen[index, site], shares[site][index])
            linear.register_forward_pre_hook(lambda _m, x, t=t: x[0] * (x[0].abs() > t))


def add_cats(model, sequences, share):
    """CATS by its definition: rows of up and columns of down are left out where |act(gate)| is small."""
    seen = {}
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(
            lambda _m, _x, y, i=i: seen.setdefault(i, []).append(torch.nn.functional.silu(y))
        )
        for i, layer in enumerate(model.model.layers)
    ]
    for row in sequences:
        model(row[None])
    for hook in hooks:
        hook.remove()

    def sparse_mlp(mlp, t):
        def forward(x):
            gate = torch.nn.functional.silu(mlp.gate_proj(x))
            output = torch.zeros(*x.shape[:-1], mlp.down_proj.out_features, dtype=x.dtype)
            for at in [(b, i) for b in range(x.shape[0]) for i in range(x.shape[1])]:
                kept = gate[at].abs() > t
                up = mlp.up_proj.weight[kept] @ x[at]
                if mlp.up_proj.bias is not None:
                    up = up + mlp.up_proj.bias[kept]
                output[at] = mlp.down_proj.weight[:, kept] @ (gate[at][kept] * up)
            return output if mlp.down_proj.bias is None else output + mlp.down_proj.bias

        return forward

    for i, layer in enumerate(model.model.layers):
        layer.mlp.forward = sparse_mlp(layer.mlp, quantile(seen[i], share))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_teal_equals_masks_on_the_dense_model(
    make_model, quick_convert, token_ids, text_file, tokenizer, family, sparsity
):
    reference, ids = make_model(family, torch.float64), token_ids(2, 20, seed=5)
    dense = reference(ids).logits
    add_teal(reference, calibration_ids(text_file, tokenizer), dict.fromkeys(SITES, [sparsity] * 3))
    expected = reference(ids).logits
    model = quick_convert(make_model(family, torch.float64), method="teal", sparsity=sparsity, seed=1)
    assert relative_error(model(ids).logits, expected) < 1e-12
    assert relative_error(expected, dense) > 0.01


@pytest.mark.usefixtures("exact_norms")
def test_greedy_teal_equals_masks_on_the_dense_model(make_model, quick_convert, token_ids, text_file, tokenizer):
    model = quick_convert(make_model("llama", torch.float64), method="teal", search="greedy", sparsity=0.5)
    shares = model.config.larosa["thresholds"]["dropped"]
    assert len({round(share[0], 6) for share in shares.values()}) > 1  # not the even allocation
    reference, ids = make_model("llama", torch.float64), token_ids(2, 20, seed=5)
    add_teal(reference, calibration_ids(text_file, tokenizer), shares)
    assert relative_error(model(ids).logits, reference(ids).logits) < 1e-12


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.1, 0.3])
def test_cats_equals_an_mlp_without_the_rows_and_columns(
    make_model, quick_convert, token_ids, text_file, tokenizer, family, sparsity
):
    reference, ids = make_model(family, torch.float64), token_ids(2, 20, seed=5)
    dense = reference(ids).logits
    total = sum(linear.weight.numel() for linear, _ in linears(reference.model.layers[0]))
    add_cats(reference, calibration_ids(text_file, tokenizer), sparsity * total / (2 * 32 * 56))
    expected = reference(ids).logits
    model = quick_convert(make_model(family, torch.float64), method="cats", sparsity=sparsity, seed=1)
    assert relative_error(model(ids).logits, expected) < 1e-12
    assert relative_error(expected, dense) > 0.001


@pytest.mark.parametrize("family", FAMILIES)
def test_topk_is_larosa_without_a_rotation(make_model, quick_convert, token_ids, family):
    ids = token_ids(2, 20)
    topk = quick_convert(make_model(family), method="topk")
    larosa_ = quick_convert(make_model(family), rotation="none", score="magnitude", value_rotation=False)
    assert torch.equal(topk(ids).logits, larosa_(ids).logits)
    block = topk.config.larosa
    assert (block["method"], block["rotation"], block["covariance"], block["calibration"]) == (
        "topk",
        "none",
        None,
        None,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_changes_at_zero_sparsity(make_model, quick_convert, token_ids, family, name):
    model, ids = make_model(family), token_ids(2, 24)
    expected = model(ids).logits
    assert torch.equal(quick_convert(model, **{**options_of(name), "sparsity": 0.0})(ids).logits, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_weight_is_changed(make_model, quick_convert, name):
    before = make_model("llama", tie_word_embeddings=True).state_dict()
    model = quick_convert(make_model("llama", tie_word_embeddings=True), **options_of(name))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[key]) for key, weight in after.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_after_a_dense_prompt(make_model, quick_convert, token_ids, name):
    ids = token_ids(1, 20)
    sparse = quick_convert(make_model("llama", torch.float64), **options_of(name))
    model = quick_convert(make_model("llama", torch.float64), prefill="dense", **options_of(name))
    dense = make_model("llama", torch.float64)(ids).logits
    assert torch.equal(model(ids).logits, dense)
    kept = cache_argument(model, DynamicCache())
    model(ids[:, :12], use_cache=True, **kept)
    step = model(ids[:, 12:13], use_cache=True, **kept).logits
    assert relative_error(step, dense[:, 12:13]) > 1e-4  # sparse
    assert relative_error(step, sparse(ids).logits[:, 12:13]) > 1e-4  # behind a dense prompt


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.one_of(4)
def test_saving_what_was_loaded_changes_nothing(make_model, quick_convert, tmp_path, token_ids, family, name):
    first, second = tmp_path / "first", tmp_path / "second"
    model = quick_convert(make_model(family), **options_of(name))
    model.save_pretrained(first)
    loaded = AutoModelForCausalLM.from_pretrained(first, device_map={"": "cpu"})
    for weight in loaded.parameters():
        weight.data = weight.data.clone()  # out of the mapped file, whose alignment may change last bits
    assert torch.equal(loaded(token_ids(2, 15)).logits, model(token_ids(2, 15)).logits)
    loaded.save_pretrained(second)
    for file in ("config.json", "model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.slow
def test_checkpoints_load_in_a_fresh_process(make_model, quick_convert, token_ids, tmp_path):
    code = """
import sys, torch, larosa
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root, *names = sys.argv[1:]
for name in names:
    model = AutoModelForCausalLM.from_pretrained(Path(root) / name)
    for weight in model.parameters():
        weight.data = weight.data.clone()
    ids, logits, tokens = torch.load(Path(root) / name / "expected.pt")
    assert torch.equal(model(ids).logits, logits), name
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens), name
    print(name, model.config.larosa["method"])
"""
    for name in OPTIONS:
        model, ids = quick_convert(make_model("qwen3"), **options_of(name)), token_ids(2, 15)
        model.save_pretrained(tmp_path / name)
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
        torch.save((ids, model(ids).logits, tokens), tmp_path / name / "expected.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, tmp_path, *OPTIONS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} {name.partition('-')[0]}" for name in OPTIONS]


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_generation_does_not_depend_on_the_cache(make_model, quick_convert, token_ids, name):
    model = quick_convert(make_model("mistral", torch.float64), **options_of(name))
    outputs = [
        model.generate(token_ids(2, 10), max_new_tokens=15, min_new_tokens=15, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_fluctuate_and_counts_do_not(make_model, quick_convert, token_ids, family):
    ids, spreads = token_ids(4, 30, seed=8), {}
    for method in ("topk", "teal"):
        model = quick_convert(make_model(family), method=method)
        with ZeroCounter(model) as zeros:
            model(ids)
        spreads[method] = zeros.fractions(), zeros.actual_sparsity()
    for site in SITES:
        assert spreads["topk"][0][site].min == spreads["topk"][0][site].max
        assert spreads["teal"][0][site].std > 0.01
    assert spreads["topk"][1].std == pytest.approx(0, abs=1e-12)
    assert spreads["teal"][1].std > 0.01
    assert spreads["teal"][1].mean == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_configurations_sparsity_is_what_calibration_tokens_skip(
    make_model, quick_convert, text_file, tokenizer, name
):
    model = quick_convert(make_model("llama"), seed=1, **options_of(name))
    promised = larosa.inspect(model).sparsity
    assert promised.nominal == OPTIONS[name]["sparsity"]
    assert promised.weights == pytest.approx(promised.nominal, abs=0.02)
    # The first layer sees in calibration what it sees later; those behind it are fed by sparse layers.
    layer_zero = {}
    with ZeroCounter(model) as zeros:
        for row in calibration_ids(text_file, tokenizer):
            model(row[None])
    for site in selectors(model, find_architecture("llama")):
        counts = zeros.zeros()[site][0].double()
        layer_zero[site] = float(counts.mean()) / SiteSizes.of(model.config).width[site]
    thresholds = model.config.larosa["thresholds"]
    if thresholds is not None:
        first = next(iter(layer_zero))  # what no other site's zeros come before
        assert layer_zero[first] == pytest.approx(thresholds["dropped"][first][0], abs=1e-6)


def test_cats_leaves_everything_but_the_mlps_inside_alone(make_model, quick_convert, token_ids):
    model = quick_convert(make_model("llama"), method="cats", sparsity=0.3)
    with ZeroCounter(model) as zeros:
        model(token_ids(2, 20))
    fractions = zeros.fractions()
    assert list(fractions) == [*SITES, "gate"]
    assert [fractions[site].max for site in ("h1", "h2", "h3")] == [0, 0, 0]
    assert fractions["h4"] == fractions["gate"]
    assert fractions["gate"].mean > 0.3


@pytest.mark.parametrize("sparsity", [0.56, 0.9])
def test_cats_states_its_reach(make_model, quick_convert, sparsity):
    # q, k, v, o: 32 x (32 + 16 + 16 + 32) weights; gate, up, down: 32 x 56 each.
    reach = 2 * 56 / (3 * 56 + 96)
    message = rf"CATS skips only up and down: at most {reach:.1%} of this model's weights"
    with pytest.raises(LarosaError, match=message):
        quick_convert(make_model("llama"), method="cats", sparsity=sparsity)
    quick_convert(make_model("llama"), method="cats", sparsity=0.42)


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_bad_activations_are_named(make_model, quick_convert, method):
    model = make_model("llama", torch.float32)
    model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    model.model.layers[1].mlp.gate_proj.weight.fill_(3e38)
    with pytest.raises(LarosaError, match=r"layer 1, site (h4|gate): calibration activations are NaN or Inf"):
        quick_convert(model, method=method, sparsity=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_cpu(make_model, quick_convert, token_ids, family, name):
    ids = token_ids(2, 24)
    expected = quick_convert(make_model(family, torch.float64), **options_of(name))
    for model, device in (
        (make_model(family, torch.float64), "cuda"),
        (make_model(family, torch.float64).cuda(), None),
    ):
        found = quick_convert(model, device=device, **options_of(name))
        thresholds = expected.config.larosa["thresholds"]
        if thresholds is not None:
            for site, values in thresholds["values"].items():
                assert found.config.larosa["thresholds"]["values"][site] == pytest.approx(values, rel=1e-5)
        where = found.lm_head.weight.device
        assert relative_error(found(ids.to(where)).logits.cpu(), expected(ids).logits) < 1e-2
