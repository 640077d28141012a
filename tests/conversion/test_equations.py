"""Conversions against the paper's equations 7 to 10, and those of the extensions."""

import pytest
import torch
from transformers import DynamicCache

from larosa import PerSite
from larosa.architectures import cache_argument

from .reference import EXTENSIONS, PLAIN, Reference, calibration_ids, plain, relative_error


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
@pytest.mark.parametrize(
    ("rotation", "covariance"),
    [("layer", "h1"), ("layer", "h3"), ("layer", "joint"), ("block", "joint"), ("model", "h1"), ("model", "joint")],
)
def test_equals_the_papers_equations(
    make_model, quick_convert, token_ids, text_file, tokenizer, family, sparsity, rotation, covariance
):
    model, ids = make_model(family, torch.float64, **plain(family)), token_ids(20, seed=5)
    reference = Reference(model)
    reference.calibrate(calibration_ids(text_file, tokenizer), rotation, covariance)
    keep = {site: width - round(sparsity * width) for site, width in (("h1", 32), ("h2", 32), ("h3", 32), ("h4", 56))}
    expected = reference(ids, keep)
    dense = model(ids[None]).logits[0]

    converted = quick_convert(model, sparsity=sparsity, rotation=rotation, covariance=covariance, **PLAIN)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8
    assert relative_error(expected, dense) > 0.01  # sparsity of this size is far from rounding


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("keys", [2, 4], ids=["gqa", "mha"])
@pytest.mark.parametrize("rotation", ["layer", "block"])
@pytest.mark.parametrize(
    "parts",
    [
        {"score": "weights"},
        {"value_rotation": True},
        {"rotation_objective": "outputs"},
        EXTENSIONS,
    ],
    ids=["score", "values", "outputs", "all"],
)
def test_equals_the_equations_of_the_extensions(
    make_model, quick_convert, token_ids, text_file, tokenizer, family, keys, rotation, parts
):
    options = {**PLAIN, **parts}
    model = make_model(family, torch.float64, num_key_value_heads=keys, **plain(family))
    ids = token_ids(20, seed=5)
    reference = Reference(model, scored=options["score"] == "weights")
    sequences = calibration_ids(text_file, tokenizer)
    reference.calibrate(sequences, rotation, "joint", options["rotation_objective"], options["value_rotation"])
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(model, rotation=rotation, **options)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("values", [False, True])
def test_scores_and_values_without_a_rotation_of_the_stream(
    make_model, quick_convert, token_ids, text_file, tokenizer, values
):
    model, ids = make_model("llama", torch.float64), token_ids(20, seed=8)
    reference = Reference(model, rotated=False, scored=True)
    if values:
        for sequence in calibration_ids(text_file, tokenizer):
            reference(sequence)
        for i in reference.layers:
            rows = torch.cat(reference.moments[i, "h2"])
            reference.bases[i, "h2"] = torch.block_diag(*reference.value_bases(rows))
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(
        model, rotation="none", score="weights", value_rotation=values, rotation_objective="inputs"
    )
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"rotation": "model"}, [(0, 1, 2)]),
        ({"layers_per_rotation": 2}, [(0,), (1, 2)]),
        ({"layers_per_rotation": 3}, [(0, 1, 2)]),
    ],
)
def test_one_basis_for_a_group_of_layers_from_the_sum_of_what_each_layer_wants(
    make_model, quick_convert, token_ids, text_file, tokenizer, options, groups
):
    model, ids = make_model("llama", torch.float64), token_ids(20, seed=9)
    reference = Reference(model)
    for sequence in calibration_ids(text_file, tokenizer):
        reference(sequence)
    for group in groups:
        target = 0
        for i in group:
            rows = torch.cat([*reference.moments[i, "h1"], *reference.moments[i, "h3"]])
            grams = sum(m.T @ m for site in ("h1", "h3") for m in reference.matrices(i, site))
            target = target + rows.T @ rows / rows.square().sum() + grams / grams.trace()
        for i in group:
            reference.bases[i, "h1"] = reference.bases[i, "h3"] = torch.linalg.eigh(target)[1]
    expected = reference(ids, {"h1": 16, "h2": 16, "h3": 16, "h4": 28})
    converted = quick_convert(model, **{**PLAIN, "rotation_objective": "outputs", **options})
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.parametrize("layers_per_rotation", [3, 100])
@pytest.mark.parametrize("objective", ["inputs", "outputs", "fisher"])
def test_one_group_of_all_layers_is_rotation_model(make_model, quick_convert, layers_per_rotation, objective):
    options = {"rotation_objective": objective}
    whole = quick_convert(make_model("qwen3"), rotation="model", **options).state_dict()
    group = quick_convert(make_model("qwen3"), layers_per_rotation=layers_per_rotation, **options).state_dict()
    assert group.keys() == whole.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in group.items())


@pytest.mark.usefixtures("exact_norms")
def test_equals_the_papers_equations_without_rotation_and_with_coefficients(make_model, quick_convert, token_ids):
    model, ids = make_model("llama", torch.float64), token_ids(20, seed=6)
    reference = Reference(model, rotated=False)
    alphas = PerSite(h1=0.9, h2=1.3, h3=0.8, h4=1.2)
    keep = {"h1": 32 - 14, "h2": 32 - 21, "h3": 32 - 13, "h4": 56 - 34}  # alpha x 50% of 32 and 56, rounded
    expected = reference(ids, keep)
    converted = quick_convert(model, sparsity=0.5, rotation="none", alphas=alphas, **PLAIN)
    assert relative_error(converted(ids[None]).logits[0], expected) < 1e-8


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_decoding_after_a_prompt_equals_the_papers_equations(
    make_model, quick_convert, token_ids, text_file, tokenizer, prefill
):
    model, ids = make_model("qwen2", torch.float64, **plain("qwen2")), token_ids(20, seed=7)
    reference = Reference(model)
    reference.calibrate(calibration_ids(text_file, tokenizer), "layer", "joint")
    keep = {"h1": 16, "h2": 16, "h3": 16, "h4": 28}
    expected = reference(ids, keep, dense_tokens=12 if prefill == "dense" else 0)

    converted = quick_convert(model, sparsity=0.5, prefill=prefill, **PLAIN)
    kept = cache_argument(converted, DynamicCache())
    logits = [converted(ids[None, :12], use_cache=True, **kept).logits[0]]
    for i in range(12, 20):
        logits.append(converted(ids[None, i : i + 1], use_cache=True, **kept).logits[0])
    assert relative_error(torch.cat(logits), expected) < 1e-8
