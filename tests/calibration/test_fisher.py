import pytest
import torch

from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.calibration import fisher, layer_fisher, layer_statistics

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CPU = torch.device("cpu")


def drawn_tokens(logits, generator, positions):
    """One token of each of the model's predictions, by the inverse of their distribution function."""
    tokens = []
    for part in logits.softmax(-1).split(positions):
        for p, u in zip(part, torch.rand(1, len(part), 1, generator=generator, dtype=torch.float64)[0], strict=True):
            total, token = 0.0, -1
            while total <= float(u):
                token += 1
                total += float(p[token])
            tokens.append(token)
    return torch.tensor(tokens)


def gradients_of_the_whole_model(model, ids, generator, positions):
    """For every layer the gradients at what q, o, gate and down read, by one ordinary backward pass."""
    seen = {}
    for i, layer in enumerate(model.model.layers):
        readers = {"h1": "self_attn.q_proj", "h2": "self_attn.o_proj", "h3": "mlp.gate_proj", "h4": "mlp.down_proj"}
        for site, name in readers.items():
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _m, x, at=(i, site): seen.__setitem__(at, x[0]) or None
            )
    model.model.embed_tokens.weight.requires_grad_()
    logits = model(ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(
        logits, drawn_tokens(logits.detach(), generator, positions), reduction="sum"
    )
    return dict(zip(seen, (g[0] for g in torch.autograd.grad(loss, list(seen.values()))), strict=True))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", [512, 7])
def test_equals_an_ordinary_backward_pass(make_model, token_ids, monkeypatch, family, positions):
    monkeypatch.setattr(fisher, "_POSITIONS", positions)
    model, sequences = make_model(family, torch.float64), token_ids(3, 20)
    found = layer_fisher(model, find_architecture(family), sequences, CPU, seed=4)
    generator, expected = torch.Generator().manual_seed(4), {}
    for ids in sequences:
        gradients = gradients_of_the_whole_model(make_model(family, torch.float64), ids, generator, positions)
        for at, g in gradients.items():
            expected[at] = expected.get(at, 0) + g.T @ g / sequences.numel()
    size = model.config.head_dim if family in ("mistral", "qwen3") else 8
    for i, of_layer in enumerate(found):
        for site in ("h1", "h3"):
            torch.testing.assert_close(getattr(of_layer, site), expected[i, site])
        blocks = [expected[i, "h2"][n : n + size, n : n + size] for n in range(0, 4 * size, size)]
        torch.testing.assert_close(of_layer.h2, torch.stack(blocks))
        torch.testing.assert_close(of_layer.h4, expected[i, "h4"].diagonal())


@pytest.mark.slow
@pytest.mark.usefixtures("exact_norms")
def test_predicts_the_divergence_of_a_small_change(make_model):
    model = make_model("llama", torch.float64)
    # One prediction, whose tokens are drawn many times over.
    (_, _, last) = layer_fisher(model, find_architecture("llama"), torch.full((1500, 1), 9), CPU, seed=0)
    change = 1e-3 * torch.randn(56, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = int(last.h4.argmax())
    before = model(torch.tensor([[9]])).logits.log_softmax(-1)
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda _m, x: x[0] + torch.nn.functional.one_hot(torch.tensor(index), 56) * change[index]
    )
    after = model(torch.tensor([[9]])).logits.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum())
    assert float(last.h4[index] * change[index] ** 2 / 2) == pytest.approx(divergence, rel=0.2)


def test_draws_tokens_as_often_as_they_are_likely():
    p = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    drawn = fisher._draw(p.log().expand(40_000, 6), torch.Generator().manual_seed(0))
    assert drawn.shape == (40_000, 1)
    counts = drawn.flatten().bincount(minlength=6) / 40_000
    assert bool((counts[p == 0] == 0).all())
    torch.testing.assert_close(counts, p, rtol=0, atol=5 * (0.25 / 40_000) ** 0.5)


def test_leaves_the_model_as_it_was(make_model, token_ids):
    model, ids = make_model("llama"), token_ids(2, 9)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(ids).logits
    layer_fisher(model, find_architecture("llama"), ids, CPU, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids).logits, expected)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_seed_alone_decides(make_model, token_ids):
    def run(seed):
        return layer_fisher(make_model("llama"), find_architecture("llama"), token_ids(2, 9), CPU, seed)[0].h1

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)


def test_bad_activations_and_gradients_are_named(make_model, token_ids):
    model = make_model("llama", torch.float32)
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(LarosaError, match=r"layer 2, site h\d, gradients: .* NaN or Inf"):
        layer_fisher(model, find_architecture("llama"), token_ids(1, 9), CPU, seed=0)
    model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(LarosaError, match=r"layer 1: .* NaN or Inf"):
        layer_fisher(model, find_architecture("llama"), token_ids(1, 9), CPU, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_cpu(make_model, token_ids, family):
    sequences, architecture = token_ids(2, 20), find_architecture(family)
    expected = layer_fisher(make_model(family, torch.float64), architecture, sequences, CPU, seed=0)
    for model in (make_model(family, torch.float64), make_model(family, torch.float64).cuda()):  # offloaded, resident
        found = layer_fisher(model, architecture, sequences, torch.device("cuda"), seed=0)
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_rotated_has_the_diagonal_alone(make_model, token_ids, family):
    architecture, sequences = find_architecture(family), token_ids(3, 20)
    model = make_model(family, torch.float64)
    whole = layer_fisher(model, architecture, sequences, CPU, seed=4, first=1)
    found = layer_fisher(model, architecture, sequences, CPU, seed=4, first=1, rotated=False)
    statistics = layer_statistics(model, architecture, sequences, CPU, first=1)
    for a, b, of_layer in zip(found, whole, statistics, strict=True):
        for site in ("h1", "h3"):
            torch.testing.assert_close(getattr(a, site), getattr(b, site).diagonal())
        torch.testing.assert_close(a.h2, b.h2)
        torch.testing.assert_close(a.values, of_layer.values)
