"""A whole site in one launch against its float64 reference, and against the operators that do its parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops import column_major
from larosa.ops.cuda import kernels as cuda_kernels
from larosa.ops.select import rms_norm_top_k_reference, top_k_reference
from larosa.ops.site import site_by_parts, site_reference

from .cases import DTYPES, bits, doubled, entries

EPS = torch.finfo(torch.float32).eps


def problem(seed, dtype, width, outputs, *, adapter=None, biased=False, scored=True, kind="normal"):
    weights = [entries("normal", n, width, seed=seed + i).to(dtype) for i, n in enumerate(outputs)]
    return {
        "x": entries(kind, 1, width, seed=seed + 10),
        "score": entries("normal", width, seed=seed + 11).abs() if scored else None,
        "weights": [column_major(weight) for weight in weights],
        "biases": [entries("normal", n, seed=seed + 12).to(dtype) if biased else None for n in outputs],
        "adapter": None
        if adapter is None
        else column_major(entries("normal", sum(outputs), adapter, seed=seed + 13).to(dtype)),
    }


def run(target, parts, k, *, normed=False, gain=None, gated=False, residual=None):
    arguments = (parts["x"], normed, gain, 1e-5, k, parts["score"], parts["weights"], parts["biases"], gated)
    return target("site", *arguments, residual, parts["adapter"]), arguments


def check(result, arguments, residual, adapter, selection):
    """Within the bound of any order of summation, for the entries that were chosen."""
    x, normed, gain, eps, k, score, weights, biases, gated = arguments
    values, indices = (part[0] for part in selection)
    chosen = [weight[:, indices.long()].double() for weight in weights]
    sums = torch.cat([values.double() @ weight.T for weight in chosen])
    size = torch.cat([values.double().abs() @ weight.abs().T for weight in chosen])
    bias = torch.cat([torch.zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]).double()
    sums, size = sums + bias, size + bias.abs()
    if residual is not None:
        mapped = residual[0].double() if adapter is None else residual[0].double() @ adapter.double().T
        bound = residual[0].abs().double() if adapter is None else residual[0].abs().double() @ adapter.abs().double().T
        sums, size = sums + mapped, size + bound
    bound = (x.shape[1] + (0 if adapter is None else adapter.shape[1]) + 8) * EPS * size + 1e-40
    if gated:
        gate, up = sums.chunk(2)
        of_gate, of_up = bound.chunk(2)
        sums = torch.nn.functional.silu(gate) * up
        bound = 1.1 * of_gate * (up.abs() + of_up) + of_up * gate.abs() + 8 * EPS * sums.abs() + 1e-40
    assert result.dtype == torch.float32
    assert ((result[0].double() - sums).abs() <= bound).all()


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_site(target, data):
    draw = data.draw
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(DTYPES))
    width, gated = draw(st.integers(1, 512) | st.integers(1025, 1100)), draw(st.booleans())
    size = st.integers(1, 20).map(lambda n: 8 * n)
    outputs = [draw(size)] * 2 if gated else draw(st.lists(size, min_size=1, max_size=3))
    k = draw(st.integers(0, width) | st.just(width))
    adapter = None if gated else draw(st.none() | st.integers(1, 300))
    parts = problem(seed, dtype, width, outputs, adapter=adapter, biased=draw(st.booleans()), scored=draw(st.booleans()))
    wide = sum(outputs) if adapter is None else adapter
    residual = None
    if not gated and (adapter is not None or draw(st.booleans())):
        residual = entries("normal", 1, wide, seed=seed)
    normed = draw(st.booleans())
    gain = entries("normal", width, seed=seed + 3).to(dtype) if normed and draw(st.booleans()) else None
    result, arguments = run(target, parts, k, normed=normed, gain=gain, gated=gated, residual=residual)
    if normed:
        selection = rms_norm_top_k_reference(parts["x"].double(), doubled(gain), 1e-5, k, doubled(parts["score"]))
    else:
        selection = top_k_reference(parts["x"].double(), k, doubled(parts["score"]))
    check(result, arguments, residual, parts["adapter"], selection)


@pytest.mark.parametrize("kind", ["tied", "zero", "special", "huge"])
@pytest.mark.parametrize(("width", "k"), [(1000, 400), (1000, 1), (513, 512), (14000, 6000)])
def test_selections_are_those_of_the_parts(target, kind, width, k):
    """Bit by bit, ties and NaN included: with columns of the identity, the result is what was chosen."""
    x, score = entries(kind, 1, width, seed=1), entries("tied", width, seed=2).abs()
    values, indices = target("top_k", x, k, score)
    weight = torch.zeros(16, width)
    at = torch.arange(width) % 16
    weight[at, torch.arange(width)] = 1.0
    one = torch.zeros(1, width).scatter_(1, indices.long(), torch.ones_like(values))
    counted, _ = run(target, {"x": one, "score": None, "weights": [column_major(weight)], "biases": [None], "adapter": None}, width)
    parts = {"x": x, "score": score, "weights": [column_major(weight)], "biases": [None], "adapter": None}
    result, arguments = run(target, parts, k)
    expected = site_reference(*(doubled(a) if isinstance(a, torch.Tensor) else a for a in arguments[:6]), [weight.double()], [None])
    assert counted.sum() == k
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_outputs_go_by_parts(target, dtype):
    parts = problem(5, dtype, 300, [33, 7])
    result, arguments = run(target, parts, 100)
    check(result, arguments, None, None, top_k_reference(parts["x"], 100, parts["score"]))


def test_columns_that_are_not_chosen_do_not_show(target):
    weight = torch.full((16, 600), torch.nan)
    weight[:, 3] = 2.0
    x = torch.zeros(1, 600)
    x[0, 3] = 1.5
    parts = {"x": x, "score": None, "weights": [column_major(weight)], "biases": [None], "adapter": None}
    assert run(target, parts, 1)[0].eq(3.0).all()


def test_many_outputs_take_several_passes(target):
    parts = problem(7, torch.float16, 64, [8 * 700, 8 * 700])
    for gated in (False, True):
        result, arguments = run(target, parts, 20, gated=gated)
        check(result, arguments, None, None, top_k_reference(parts["x"], 20, parts["score"]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gated": True}, "a gated site has two matrices"),
        ({"adapter": 32}, "an adapter goes with a residual"),
        ({"k": 65}, "cannot keep 65 of 64"),
    ],
)
def test_bad_arguments(target, changes, complaint):
    parts = problem(1, torch.float32, 64, [16], adapter=changes.get("adapter"))
    with pytest.raises(ValueError, match=complaint):
        run(target, parts, changes.get("k", 5), gated=changes.get("gated", False))


def test_the_schema_gives_the_shapes_of_the_result():
    parts = problem(1, torch.float32, 64, [16, 16])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(parts[name]) if name in ("x", "score") else parts[name] for name in parts}
        for gated, outputs in ((False, 32), (True, 16)):
            made = torch.ops.larosa.site(
                fake["x"], True, None, 1e-5, 20, fake["score"], fake["weights"], fake["biases"], gated
            )
            assert made.shape == (1, outputs)
