import pytest
import torch

from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.calibration import layer_second_moments

CPU = torch.device("cpu")


def moments_of(model, ids, device=CPU):
    return layer_second_moments(model, find_architecture(model.config.model_type), ids, device)


def plain_moments(model, ids):
    """The definition: run the whole model, take each norm's input, normalise and average in float64."""
    seen = {}
    hooks = [
        norm.register_forward_hook(
            lambda module, inputs, output, at=(i, site): seen.setdefault(at, []).append((inputs[0], module))
        )
        for i, layer in enumerate(model.model.layers)
        for site, norm in (("h1", layer.input_layernorm), ("h3", layer.post_attention_layernorm))
    ]
    for row in ids:
        model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    result = {}
    for at, calls in seen.items():
        x = torch.cat([inputs[0].double() for inputs, _ in calls])
        u = x / (x.square().mean(-1, keepdim=True) + calls[0][1].variance_epsilon).sqrt()
        result[at] = sum(torch.outer(token, token) for token in u) / len(u)
    return result


def assert_equals_plain(moments, plain, rtol):
    assert len(moments) * 2 == len(plain)
    for i, layer in enumerate(moments):
        for site in ("h1", "h3"):
            expected = plain[i, site]
            assert getattr(layer, site).dtype == torch.float64
            torch.testing.assert_close(getattr(layer, site).cpu(), expected, rtol=0, atol=rtol * float(expected.max()))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_equal_a_plain_forward_pass(make_model, token_ids, model_type):
    model, ids = make_model(model_type, torch.float64), token_ids(3, 20)
    assert_equals_plain(list(moments_of(model, ids)), plain_moments(model, ids), 1e-12)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equal_a_plain_forward_pass_in_narrow_dtypes(make_model, token_ids, model_type, dtype, rtol):
    model, ids = make_model(model_type, dtype), token_ids(3, 20)
    assert_equals_plain(list(moments_of(model, ids)), plain_moments(model, ids), rtol)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("model_type", ["llama", "smollm3"])
def test_a_layer_may_be_changed_once_its_moments_are_out(make_model, token_ids, model_type):
    model, ids = make_model(model_type, torch.float64), token_ids(2, 20)
    plain = plain_moments(model, ids)
    moments = []
    for layer, found in zip(model.model.layers, moments_of(model, ids), strict=True):
        moments.append(found)
        for weight in layer.parameters():
            weight.fill_(float("nan"))
    assert_equals_plain(moments, plain, 1e-12)


def test_leave_the_model_as_it_was(make_model, token_ids):
    model, ids = make_model("qwen2"), token_ids(2, 20)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits, layers = model(ids).logits, model.model.layers
    list(moments_of(model, ids))
    assert model.model.layers is layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, logits)


def test_trace_is_the_width(make_model, token_ids):
    # x has root mean square 1, up to the norm's epsilon.
    for layer in moments_of(make_model("llama"), token_ids(4, 16)):
        for C in layer:
            assert float(C.trace()) == pytest.approx(32, rel=1e-4)
            assert torch.equal(C, C.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("layer", "name", "where"),
    [(1, "self_attn.o_proj", "layer 1, site h3"), (1, "mlp.down_proj", "layer 2, site h1")],
)
def test_name_the_place_of_bad_activations(make_model, token_ids, layer, name, where, value):
    model = make_model("llama")
    model.model.layers[layer].get_submodule(name).weight[0, 0] = value
    with pytest.raises(LarosaError, match=where):
        list(moments_of(model, token_ids(2, 16)))


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_layers_visit_the_device_one_at_a_time(make_model, token_ids, model_type):
    model, ids = make_model(model_type), token_ids(3, 20)
    plain = plain_moments(model, ids)
    moments = []
    for found in moments_of(model, ids, torch.device("cuda")):
        on_device = [i for i, layer in enumerate(model.model.layers) if next(layer.parameters()).is_cuda]
        assert on_device == [len(moments)]
        moments.append(found)
    assert all(weight.device == CPU for weight in model.parameters())
    assert_equals_plain(moments, plain, 1e-4)
