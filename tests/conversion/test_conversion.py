import copy

import pytest
import torch

import larosa
from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import SITES
from larosa.evaluation.zeros import ZeroCounter
from larosa.models import selectors

from .reference import EXTENSIONS, ROTATIONS, VARIANTS, relative_error


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.one_of(2)
def test_exact_at_zero_sparsity_in_float64(make_model, quick_convert, token_ids, family, overrides, rotation):
    model, ids = make_model(family, torch.float64, **overrides), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, **EXTENSIONS)
    assert relative_error(converted(ids).logits, expected) < 1e-10


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.one_of(3)
def test_exact_at_zero_sparsity_in_float32(make_model, quick_convert, token_ids, family, overrides, rotation):
    model, ids = make_model(family, **overrides), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, **EXTENSIONS)
    assert relative_error(converted(ids).logits, expected) < 1e-4


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("layers_per_rotation", [2, 3, 4])
@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.one_of(4)
def test_exact_where_layers_share_a_rotation(make_model, quick_convert, token_ids, family, layers, layers_per_rotation):
    model, ids = make_model(family, torch.float64, num_hidden_layers=layers), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, layers_per_rotation=layers_per_rotation)
    assert relative_error(converted(ids).logits, expected) < 1e-10
    behind = [layer.residual_adapter is not None for layer in converted.model.layers]
    assert behind == [after > 0 and after % layers_per_rotation == 0 for after in reversed(range(layers))]


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("covariance", ["h1", "h3", "joint"])
def test_exact_with_a_padded_batch_and_self_calibration(make_model, token_ids, covariance):
    model, ids = make_model("qwen2", torch.float64), token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = model(ids, attention_mask=mask).logits
    larosa.convert(model, sparsity=0.0, covariance=covariance, num_sequences=3, sequence_length=20)
    found = model(ids, attention_mask=mask).logits
    assert relative_error(found[mask.bool()], expected[mask.bool()]) < 1e-10


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.77, 0.9])
@pytest.mark.one_of(3)
def test_every_site_keeps_exactly_its_count(make_model, quick_convert, token_ids, family, sparsity):
    model = quick_convert(make_model(family), sparsity=sparsity)
    seen = []

    def check(site, index):
        def hook(module, inputs, output):
            assert bool((inputs[0] != 0).all())  # so that a zero in the output was dropped
            kept = output != 0
            assert bool((kept.sum(-1) == model.config.larosa["keep"][site][index]).all())
            assert torch.equal(output[kept], inputs[0][kept])
            seen.append((site, index))

        return hook

    for site, parts in selectors(model, find_architecture(family)).items():
        for index, selector in enumerate(parts):
            selector.register_forward_hook(check(site, index))
    model(token_ids(2, 11))
    assert sorted(seen) == sorted((site, index) for site in SITES for index in range(3))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_do_not_change_the_count(make_model, quick_convert, token_ids, value):
    # Every activation alike, or all zero: thresholds would keep all or nothing, Top-K keeps k.
    model = make_model("llama", attention_bias=False, mlp_bias=False)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else value)
    model = quick_convert(model, sparsity=0.5, rotation="none", value_rotation=False, search="none")
    with ZeroCounter(model) as zeros:
        model(token_ids(2, 11))
    expected = 1.0 if value == 0 else 0.5
    for site in SITES:
        fraction = zeros.fractions()[site]
        assert (fraction.min, fraction.mean, fraction.max) == (expected, expected, expected)


def test_the_callers_configuration_is_left_alone(family_config, quick_convert):
    from transformers import AutoModelForCausalLM

    config = family_config("llama", tie_word_embeddings=True)
    before, kind = copy.deepcopy(config.to_dict()), type(config)
    model = AutoModelForCausalLM.from_config(config)
    given, before_use = model.config, model.config.to_dict()
    converted = quick_convert(model)
    assert converted is model
    assert (type(config), config.to_dict()) == (kind, before)
    assert (type(given), given.to_dict()) == (kind, before_use)
    assert converted.config is not given
    assert converted.config.model_type == "larosa_llama"
    assert converted.model.layers[0].self_attn.config is converted.config


def test_what_the_configuration_records(make_model, quick_convert, text_file):
    model = quick_convert(make_model("qwen3"), sparsity=0.25, seed=3, prefill="dense", rotation="block", search="none")
    block = model.config.larosa
    assert (block["sparsity"], block["rotation"], block["prefill"], block["recipe"]) == (0.25, "block", "dense", "best")
    assert block["larosa_version"] == larosa.__version__
    assert block["calibration"] == {
        "source": str(text_file),
        "num_sequences": 4,
        "sequence_length": 32,
        "seed": 3,
    }
    assert block["keep"]["h2"] == [64 - 16] * 3  # 4 heads of 16, a quarter dropped
    assert model.config.tie_word_embeddings is False


def test_the_same_seed_gives_the_same_model(make_model, token_ids):
    def logits(seed):
        model = larosa.convert(make_model("llama"), num_sequences=2, sequence_length=40, seed=seed)
        return model(token_ids(1, 9)).logits

    torch.manual_seed(1)
    first = logits(0)
    torch.manual_seed(2)
    assert torch.equal(logits(0), first)
    assert not torch.equal(logits(1), first)


def test_result_is_in_evaluation_mode_and_needs_no_gradient(make_model, quick_convert, token_ids):
    model = make_model("llama").train().requires_grad_(True)
    converted = quick_convert(model)
    assert not any(module.training for module in converted.modules())
    assert not any(weight.requires_grad for weight in converted.parameters())
    assert converted(token_ids(1, 5)).logits.grad_fn is None


def test_a_model_in_training_mode_is_calibrated_without_dropout(make_model, quick_convert, token_ids):
    ids = token_ids(1, 9)
    expected = quick_convert(make_model("llama", attention_dropout=0.5))(ids).logits
    assert torch.equal(quick_convert(make_model("llama", attention_dropout=0.5).train())(ids).logits, expected)


@pytest.mark.parametrize("adapters", [None, "full", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_stay_close_to_the_dense_model(make_model, quick_convert, token_ids, dtype, adapters):
    model, ids = make_model("llama", dtype), token_ids(2, 24)
    expected = model(ids).logits.float()
    converted = quick_convert(model, sparsity=0.0, adapters=adapters)
    assert {weight.dtype for weight in converted.parameters()} == {dtype} | (
        {torch.int8} if adapters != "full" else set()
    )
    # A handful of roundings of 2^-8 and 2^-11.
    assert relative_error(converted(ids).logits.float(), expected) < {torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]


def test_refuses_a_converted_model(make_model, quick_convert):
    with pytest.raises(LarosaError, match="converted already"):
        quick_convert(quick_convert(make_model("llama")))


def test_refuses_text_without_a_tokenizer(make_model, text_file):
    with pytest.raises(LarosaError, match="needs a tokenizer"):
        larosa.convert(make_model("llama"), calibration=str(text_file), num_sequences=1, sequence_length=8)


def test_refuses_sequences_longer_than_the_context(make_model, quick_convert):
    with pytest.raises(LarosaError, match="--sequence-length 129 is over the model's context of 128"):
        quick_convert(make_model("llama"), sequence_length=129, num_sequences=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_bad_weights_by_name(make_model, quick_convert, value):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(LarosaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quick_convert(model)


@pytest.mark.parametrize(
    ("model_type", "reason"), [("gemma2", "normalises after"), ("gpt2", "LayerNorm"), ("made_up", "not known")]
)
def test_refuses_other_families_with_the_reason(make_model, quick_convert, model_type, reason):
    model = make_model("llama")
    model.config.model_type = model_type
    with pytest.raises(LarosaError, match=rf"'{model_type}' .*{reason}.*supported: llama"):
        quick_convert(model)


def test_refuses_to_search_on_sequences_of_one_token(make_model, quick_convert):
    # A search scores next tokens, of which these have none.
    with pytest.raises(LarosaError, match="sequence-length"):
        quick_convert(make_model("llama"), search="grid", num_sequences=2, sequence_length=1)


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_exact_at_zero_sparsity_on_cuda(make_model, quick_convert, token_ids, family, overrides, rotation):
    model, ids = make_model(family, **overrides).cuda(), token_ids(2, 24).cuda()
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation)
    assert all(weight.is_cuda for weight in converted.parameters())
    assert relative_error(converted(ids).logits, expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_model_on_the_cpu_converts_layer_by_layer_on_cuda(make_model, quick_convert, token_ids, family, rotation):
    model, ids = make_model(family), token_ids(2, 24)
    expected = model(ids).logits
    converted = quick_convert(model, sparsity=0.0, rotation=rotation, device="cuda")
    assert not any(weight.is_cuda for weight in converted.parameters())
    assert relative_error(converted(ids).logits, expected) < 1e-4


@pytest.mark.gpu
def test_cuda_equals_cpu_at_half_sparsity(make_model, quick_convert, token_ids):
    ids = token_ids(2, 24)
    expected = quick_convert(make_model("llama", torch.float64), rotation="random")(ids).logits
    found = quick_convert(make_model("llama", torch.float64).cuda(), rotation="random")(ids.cuda()).logits.cpu()
    assert relative_error(found, expected) < 1e-4  # float32 norms
