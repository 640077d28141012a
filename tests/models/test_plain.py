"""A model in memory that is more than its configuration says is refused, by conversion and by the engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import larosa
from larosa.models.plain import check_plain


class _Quantized(nn.Linear):
    pass


def _replaced(model):
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = _Quantized(old.in_features, old.out_features)
    return model


def _shared_weight(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    return model


def _one_layer_twice(model):
    model.model.layers[2] = model.model.layers[0]
    return model


def _hook(model):
    model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: output * 2)
    return model


def _norm_hook(model):
    model.model.norm.register_forward_pre_hook(lambda _module, _inputs: None)
    return model


def _own_forward(model):
    model.model.layers[1].mlp.forward = lambda x: x
    return model


def _extra_module(model):
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)
    return model


def _pruned(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:40].clone(), requires_grad=False)
    return model


def _fewer_layers(model):
    del model.model.layers[2]
    return model


def _on_disk(model):
    model.model.layers[1].to("meta")
    return model


def _compiled(model):
    return torch.compile(model)


def _compiled_in_place(model):
    model.compile()
    return model


def _adapter(model):
    peft = pytest.importorskip("peft")
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    except ValueError as error:
        pytest.skip(str(error))  # transformers wants a newer peft
    return model


def _peft_model(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def _subclass(model):
    model.__class__ = type("Mine", (type(model),), {})
    return model


def _tensor_subclass(model):
    class Packed(torch.Tensor):
        pass

    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Packed), requires_grad=False)
    return model


_CHANGES = {
    _replaced: "'model.layers.1.mlp.up_proj' is a test_plain _Quantized, not a torch Linear",
    _shared_weight: "'model.layers.1.mlp.up_proj.weight' and 'model.layers.2.mlp.up_proj.weight' are one weight",
    _one_layer_twice: "are one weight: give each its own",
    _hook: "'model.layers.1' has a hook",
    _norm_hook: "'model.norm' has a hook",
    _own_forward: "'model.layers.1.mlp' has a forward of its own",
    _extra_module: "'model.layers.1.mlp.extra' .torch Linear. is none of the model's own",
    _pruned: "'model.layers.1.mlp.up_proj' has parameters",
    _fewer_layers: "'model.layers.2' is not there",
    _on_disk: "is not in memory",
    _compiled: "a compiled model",
    _compiled_in_place: "a compiled model",
    _adapter: "has a LoRA adapter: merge it first",
    _peft_model: "merge_and_unload",
    _subclass: "a test_plain Mine: larosa needs a LlamaForCausalLM itself",
    _tensor_subclass: "weight 'model.layers.1.mlp.up_proj.weight' is a test_plain Packed",
}


@pytest.mark.parametrize("change", _CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_model_that_is_not_plain(make_model, quick_convert, change):
    model = change(make_model("llama"))
    with pytest.raises(larosa.LarosaError, match=_CHANGES[change]):
        quick_convert(model)
    with pytest.raises(larosa.LarosaError, match=_CHANGES[change]):
        larosa.Engine(model, 16)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_models_stay_welcome(make_model, quick_convert, token_ids, family, tied):
    model = make_model(family, tie_word_embeddings=tied)
    model(token_ids(1, 4), output_hidden_states=True, output_attentions=True)  # transformers leaves hooks behind
    check_plain(model)
    check_plain(copy.deepcopy(model))
    converted = quick_convert(model)
    check_plain(converted)
    larosa.Engine(converted, 16)
    check_plain(converted)


def test_after_merging_an_adapter(make_model, quick_convert):
    check_plain(_peft_model(make_model("llama")).merge_and_unload())


def test_inference_mode(make_model, quick_convert):
    model = make_model("llama")
    with torch.inference_mode():
        with pytest.raises(larosa.LarosaError, match="outside of it"):
            quick_convert(model)
        made = make_model("llama")
    with pytest.raises(larosa.LarosaError, match="outside of it"):
        quick_convert(made)


def test_an_engine_of_a_model_made_in_inference_mode(make_model, token_ids):
    prompt = token_ids(1, 5)
    expected = larosa.Engine(make_model("llama"), 16).prefill(prompt)
    with torch.inference_mode():
        assert torch.equal(larosa.Engine(make_model("llama"), 16).prefill(prompt), expected)


def test_something_else():
    with pytest.raises(larosa.LarosaError, match="give a transformers causal language model"):
        larosa.convert(nn.Linear(2, 2))
