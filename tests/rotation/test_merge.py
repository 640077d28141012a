import pytest
import torch

from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.rotation import LayerBases, connect, merge_bases, random_basis

LLAMA = find_architecture("llama")


def block_bases(layers, size):
    return [LayerBases(random_basis(size, 2 * i), random_basis(size, 2 * i + 1)) for i in range(layers)]


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_every_weight_by_the_papers_figure_2(make_model):
    model = make_model("llama", torch.float64)
    old, bases = weights_of(model), block_bases(3, 32)
    adapters = merge_bases(model, LLAMA, connect(bases))
    new = model.state_dict()
    for i, (A, M, _) in enumerate(bases):
        behind = bases[i + 1].attention if i < 2 else M  # the paper merges down into M, and o into A
        layer = f"model.layers.{i}."
        for names, norm, Q in (("qkv", "input_layernorm", A), (("gate", "up"), "post_attention_layernorm", M)):
            gain = old[f"{layer}{norm}.weight"]
            block = "mlp" if "gate" in names else "self_attn"
            for name in names:
                key = f"{layer}{block}.{name}_proj"
                torch.testing.assert_close(new[f"{key}.weight"], old[f"{key}.weight"] @ gain.diag() @ Q)
                assert torch.equal(new[f"{key}.bias"], old[f"{key}.bias"])  # not on the rotated side
            assert bool((new[f"{layer}{norm}.weight"] == 1).all())
        for key, Q in ((f"{layer}self_attn.o_proj", M), (f"{layer}mlp.down_proj", behind)):
            torch.testing.assert_close(new[f"{key}.weight"], Q.T @ old[f"{key}.weight"])
            torch.testing.assert_close(new[f"{key}.bias"], old[f"{key}.bias"] @ Q)
        torch.testing.assert_close(adapters[i].attention.weight.T, A.T @ M)
        if i < 2:
            torch.testing.assert_close(adapters[i].residual.weight.T, M.T @ behind)
    assert adapters[2].residual is None
    key = "model.embed_tokens.weight"
    torch.testing.assert_close(new[key], old[key] @ bases[0].attention)
    head = old["lm_head.weight"] @ old["model.norm.weight"].diag() @ bases[2].mlp
    torch.testing.assert_close(new["lm_head.weight"], head)
    assert bool((new["model.norm.weight"] == 1).all())


@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("rotated", [True, False])
def test_value_bases_turn_the_rows_of_v_and_the_columns_of_o(make_model, keys, rotated):
    model = make_model("llama", torch.float64, num_key_value_heads=keys)
    old, size, group = weights_of(model), 8, 4 // keys
    Q = random_basis(32, 7) if rotated else None
    values = [torch.stack([random_basis(size, 10 * i + head) for head in range(keys)]) for i in range(3)]
    merge_bases(model, LLAMA, connect(LayerBases(Q, Q, V) for V in values))
    new = model.state_dict()
    for i, V in enumerate(values):
        layer = f"model.layers.{i}.self_attn."
        gain = old[f"model.layers.{i}.input_layernorm.weight"]
        for head in range(keys):
            rows = slice(head * size, (head + 1) * size)
            expected = V[head].T @ old[f"{layer}v_proj.weight"][rows]
            expected = expected * gain @ Q if rotated else expected
            torch.testing.assert_close(new[f"{layer}v_proj.weight"][rows], expected)
            torch.testing.assert_close(new[f"{layer}v_proj.bias"][rows], old[f"{layer}v_proj.bias"][rows] @ V[head])
        for head in range(4):
            columns = slice(head * size, (head + 1) * size)
            expected = old[f"{layer}o_proj.weight"][:, columns] @ V[head // group]
            expected = Q.T @ expected if rotated else expected
            torch.testing.assert_close(new[f"{layer}o_proj.weight"][:, columns], expected)
    if not rotated:
        for name in new:
            if "v_proj" not in name and "o_proj.weight" not in name:
                assert torch.equal(new[name], old[name]), name


def test_head_norms_of_qwen3_stay(make_model):
    model = make_model("qwen3")
    before = weights_of(model)
    merge_bases(model, find_architecture("qwen3"), connect(block_bases(3, 32)))
    for name, weight in model.state_dict().items():
        if "q_norm" in name or "k_norm" in name:
            assert torch.equal(weight, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_once(make_model, dtype):
    model = make_model("llama", dtype)
    wide = make_model("llama", torch.float64)
    wide.load_state_dict(model.state_dict())
    frames = list(connect(block_bases(3, 32), dtype=dtype))
    narrow_adapters, wide_adapters = merge_bases(model, LLAMA, frames), merge_bases(wide, LLAMA, frames)
    for name, weight in model.state_dict().items():
        # Exactly the float64 result rounded: folding and rotating one after the other would round twice.
        assert torch.equal(weight, wide.state_dict()[name].to(dtype)), name
    assert torch.equal(narrow_adapters[0].residual.weight, wide_adapters[0].residual.weight)
    assert narrow_adapters[0].residual.weight.dtype is dtype


def test_a_shared_basis_needs_no_adapter(make_model):
    Q = random_basis(32, 0)
    for adapters in merge_bases(make_model("llama"), LLAMA, connect([LayerBases(Q, Q)] * 3)):
        assert adapters.attention is None
        assert adapters.residual is None


def test_draws_a_layers_bases_before_it_changes_that_layer_or_a_later_one(make_model):
    model = make_model("llama")
    before = weights_of(model)

    def bases():
        for i in range(3):
            for name, weight in model.state_dict().items():
                rotated = any(name.startswith(f"model.layers.{j}.") for j in range(i))
                # The MLP before writes into the basis that is drawn now.
                rotated = rotated and not name.startswith(f"model.layers.{i - 1}.mlp.down_proj.")
                assert rotated or torch.equal(weight, before[name]), name
            Q = random_basis(32, i)
            yield LayerBases(Q, Q)

    merge_bases(model, LLAMA, connect(bases()))
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "layer 1, site h1"),
        ("model.layers.2.self_attn.o_proj.weight", "layer 2, site h2"),
        ("model.layers.0.mlp.gate_proj.weight", "layer 0, site h3"),
        ("model.layers.1.mlp.down_proj.weight", "layer 1, site h4"),
        ("model.embed_tokens.weight", "the embedding"),
        ("lm_head.weight", "the language-model head"),
    ],
)
def test_names_the_place_of_a_bad_weight(make_model, name, where, value):
    model = make_model("llama")
    model.state_dict()[name][3, 5] = value
    with pytest.raises(LarosaError, match=where):
        merge_bases(model, LLAMA, connect(block_bases(3, 32)))


def test_overflow_of_a_narrow_dtype_is_an_error(make_model):
    model = make_model("llama", torch.float16)
    model.model.layers[1].self_attn.q_proj.weight.fill_(60000)  # a row's 32 equal entries add up in a rotated one
    Q = torch.linalg.qr(torch.ones(32, 32, dtype=torch.float64) + torch.eye(32, dtype=torch.float64))[0]
    with pytest.raises(LarosaError, match=r"layer 1, site h1.*overflows float16"):
        merge_bases(model, LLAMA, connect([LayerBases(Q, Q)] * 3))


@pytest.mark.parametrize("count", [2, 4])
def test_needs_a_pair_for_each_layer(make_model, count):
    with pytest.raises(ValueError, match="zip"):
        merge_bases(make_model("llama"), LLAMA, connect(block_bases(count, 32)))
