import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from larosa.architectures import find_architecture
from larosa.calibration import Magnitudes, attached, visit_layers
from larosa.sparsity import SiteSizes
from larosa.sparsity.greedy import GreedyAllocation, greedy_shares

SITES = ("h1", "h2", "h3", "h4")


def skipped(shares, weights):
    return sum(shares[site] * weights[site] for site in weights) / sum(weights.values())


@settings(max_examples=examples(60))
@given(
    target=st.floats(0, 0.99),
    sizes=st.lists(st.integers(1, 60), min_size=4, max_size=4),
    costs=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    powers=st.lists(st.sampled_from([0.5, 1, 2, 3]), min_size=4, max_size=4),
    step=st.sampled_from([0.05, 0.1, 0.3]),
)
def test_every_step_takes_the_lowest_error_and_the_budget_is_met(target, sizes, costs, powers, step):
    weights = dict(zip(SITES, sizes, strict=True))
    asked = []

    def error(shares):
        value = sum(c * shares[s] ** p for s, c, p in zip(SITES, costs, powers, strict=True))
        asked.append((dict(shares), value))
        return value

    found = greedy_shares(target, weights, error, step)
    assert skipped(found, weights) == pytest.approx(target, abs=1e-8)
    assert all(0 <= share <= 1 for share in found.values())
    even = dict.fromkeys(SITES, target)
    assert error(found) <= error(even) + 1e-12

    # Replay: each step's trials differ from the state before at one site, and the state moves to the lowest.
    state, rest = dict.fromkeys(SITES, 0.0), asked[:-2]  # without the two errors above
    while (target - skipped(state, weights)) > 1e-12:
        open_sites = [site for site in SITES if state[site] < 1]
        trials, rest = rest[: len(open_sites)], rest[len(open_sites) :]
        for site, (shares, _) in zip(open_sites, trials, strict=True):
            assert [s for s in SITES if shares[s] != state[s]] == [site]
            assert (shares[site] - state[site]) * weights[site] <= step * min(sizes) * (1 + 1e-9)
        state = min(trials, key=lambda trial: trial[1])[0]
    assert [shares for shares, _ in rest] in ([], [even])
    assert found in (state, even)


def test_shortsighted_greed_gives_way_to_the_even_allocation():
    # The first step at h1 is free, everything after it is dear.
    def error(shares):
        return 0.0 if shares["h1"] <= 0.1 and shares["h2"] == 0 else 5.0 if shares["h1"] != shares["h2"] else 1.0

    assert greedy_shares(0.45, {"h1": 1, "h2": 1}, error) == {"h1": 0.45, "h2": 0.45}


def test_a_site_that_costs_nothing_is_dropped_first():
    found = greedy_shares(0.5, {"h1": 3, "h2": 1}, lambda shares: shares["h1"])
    assert found["h2"] == 1.0
    assert found["h1"] == pytest.approx(1 / 3)


def test_no_sparsity_asks_nothing():
    assert greedy_shares(0.0, {"h1": 3, "h2": 1}, lambda shares: pytest.fail("asked")) == {"h1": 0.0, "h2": 0.0}


def layer_error(model, index, hidden, kwargs_visit, shares, magnitudes):
    """By hand: mask what each linear reads, run the layer, compare lengths token by token."""
    layer = model.model.layers[index]
    linears = {
        "h1": [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
        "h2": [layer.self_attn.o_proj],
        "h3": [layer.mlp.gate_proj, layer.mlp.up_proj],
        "h4": [layer.mlp.down_proj],
    }
    thresholds = {site: magnitudes[site].threshold(share) for site, share in shares.items()}
    expected = [kwargs_visit.run(x) for x in hidden]
    hooks = [
        linear.register_forward_pre_hook(lambda _m, inputs, t=thresholds[site]: inputs[0] * (inputs[0].abs() > t))
        for site in SITES
        for linear in linears[site]
    ]
    with attached(*hooks):
        found = [kwargs_visit.run(x) for x in hidden]
    errors = [
        float((a - b).norm() / b.norm())
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x[0], y[0], strict=True)
    ]
    return sum(errors) / len(errors)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_on_a_model_each_step_is_the_best_and_the_end_beats_uniform(make_model, token_ids, family, monkeypatch):
    from larosa.sparsity import greedy

    model, ids, architecture = make_model(family, torch.float64), token_ids(3, 20), find_architecture(family)
    sizes = SiteSizes.of(model.config)
    weights = {site: sizes.weights(site) for site in SITES}
    steps = []
    allocate = greedy.greedy_shares

    def recorded(target, weights, error, step=0.25):
        return allocate(
            target, weights, lambda shares: steps.append((dict(shares), error(shares))) or steps[-1][1], step
        )

    monkeypatch.setattr(greedy, "greedy_shares", recorded)
    for visit in visit_layers(model, architecture, ids, torch.device("cpu")):
        seen = {site: Magnitudes(site) for site in SITES}
        with attached(*(architecture.tap(visit.layer, site, m.see) for site, m in seen.items())):
            visit.outputs()
        magnitudes = {site: m.finish() for site, m in seen.items()}
        steps.clear()
        found = GreedyAllocation(architecture, 0.5, weights)(visit, magnitudes)
        assert skipped(found, weights) == pytest.approx(0.5)

        def by_hand(shares, visit=visit, magnitudes=magnitudes):
            return layer_error(model, visit.index, visit.inputs, visit, shares, magnitudes)

        for shares, value in steps[:9]:
            assert value == pytest.approx(by_hand(shares), rel=1e-10)
        assert by_hand(found) <= by_hand(dict.fromkeys(SITES, 0.5)) * (1 + 1e-12)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
