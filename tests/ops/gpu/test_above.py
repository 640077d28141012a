"""`above` bit by bit, products of the entries that it counts, and the two in one against them and against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.errors import LarosaError
from larosa.ops import column_major
from larosa.ops.above_linear import rms_norm_above_swiglu_reference
from larosa.ops.cuda import kernels, launch
from larosa.ops.linear import sparse_linear_reference
from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.select import above_reference
from tests.examples import examples

from .cases import DTYPES, assert_replays_repeat, doubled, entries, seeded
from .test_products import check
from .test_selection import KINDS, same, scores
from .test_top_k_linear import EPS, along
from .test_top_k_linear import problems as products

THRESHOLDS = (0.0, 1e-45, 0.5, 1.0, 2.0, 1e30, math.inf)


def kept(selection):
    """What is meant of a counted list, as float64; zeros stand behind it."""
    values, indices, count = selection
    assert count.dtype == torch.int64
    assert not values[:, int(count) :].any()
    assert not indices[:, int(count) :].any()
    return values[:, : int(count)].double(), indices[:, : int(count)]


def between(magnitudes, share):
    """A threshold that about this share is not above, far from all magnitudes, for sums that round otherwise."""
    ordered = magnitudes.flatten().sort().values.double()
    wide = ((ordered[1:] - ordered[:-1]) > 1e-4 * ordered[1:]).nonzero()[:, 0]
    if not len(wide):
        return 0.0
    below = int(wide[(wide - share * len(ordered)).abs().argmin()])
    return float((ordered[below] + ordered[below + 1]) / 2)


@settings(max_examples=examples(40))
@given(st.data())
def test_above_is_the_reference_bit_by_bit(target, data):
    width = data.draw(st.integers(1, 300) | st.sampled_from([1023, 1024]), label="width")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    x = entries(data.draw(st.sampled_from(KINDS)), 1, width, seed=seed)
    score = data.draw(st.none() | st.sampled_from(DTYPES).map(lambda dtype: scores(width, dtype, seed)))
    threshold = data.draw(st.sampled_from(THRESHOLDS))
    *found, count = target("above", x, threshold, score)
    *expected, number = above_reference(x, threshold, score)
    assert torch.equal(count, number)
    same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [4096, 4097, 32768])
def test_long_vectors(target, kind, width):
    x = entries(kind, 1, width, seed=width)
    for threshold in (0.0, 0.7, math.inf):
        *found, count = target("above", x, threshold, None)
        *expected, number = above_reference(x, threshold)
        assert torch.equal(count, number)
        same(found, expected)


@pytest.mark.parametrize("kind", ["normal", "tied", "zero"])
@pytest.mark.parametrize("width", [300, 1500])
def test_fused_selections_are_above_of_what_they_fuse(target, kind, width):
    x, gate_up = entries(kind, 1, width, seed=1), entries(kind, 1, 2 * width, seed=2)
    gain, score = entries("normal", width, seed=3).bfloat16(), scores(width, torch.float32, 4)
    for weighted in (None, score):
        for name, source, exact in (
            ("silu_mul_above", (gate_up,), silu_mul_reference(gate_up.double())),
            ("rms_norm_above", (x, None, EPS), rms_norm_reference(x.double(), None, EPS)),
            ("rms_norm_above", (x, gain, EPS), rms_norm_reference(x.double(), gain, EPS)),
        ):
            threshold = between(exact.abs() * (1 if weighted is None else weighted), 0.5)
            values, indices = kept(target(name, *source, threshold, weighted))
            expected = kept(above_reference(exact, threshold, weighted))
            assert torch.equal(indices, expected[1])
            torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-30)


def test_longer_vectors_than_registers_hold(target):
    x, gain = entries("normal", 1, 20000, seed=0), entries("normal", 20000, seed=1)
    exact = rms_norm_reference(x.double(), gain, EPS)
    threshold = between(exact.abs() * gain.abs(), 0.6)
    values, indices = kept(target("rms_norm_above", x, gain, EPS, threshold, gain.abs()))
    expected = kept(above_reference(exact, threshold, gain.abs()))
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-30)
    gate_up = entries("normal", 1, 2 * 18944, seed=2)
    exact = silu_mul_reference(gate_up.double())
    threshold = between(exact.abs(), 0.6)
    values, indices = kept(target("silu_mul_above", gate_up, threshold, None))
    expected = kept(above_reference(exact, threshold))
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-30)


def test_nan_is_above_any_threshold(target):
    x = entries("normal", 1, 300, seed=0)
    x[0, 7] = torch.nan
    values, indices = kept(target("rms_norm_above", x, None, EPS, math.inf, None))
    assert values.isnan().all()
    assert indices.tolist() == [list(range(300))]
    gate_up = torch.cat([x, torch.ones(1, 300)], 1)
    values, indices = kept(target("silu_mul_above", gate_up, math.inf, None))
    assert values.isnan().all()
    assert indices.tolist() == [[7]]


def counted(count, room, depth, seed=0):
    """A list with room for more; whoever reads what stands behind the entries that count reads NaN."""
    order = torch.randperm(depth - 1, generator=seeded(seed))[:count].sort().values.int()
    values, indices = torch.full((1, room), torch.nan), torch.full((1, room), depth - 1, dtype=torch.int32)
    values[0, :count], indices[0, :count] = entries("normal", count, seed=seed), order
    return values, indices, torch.tensor([count])


@pytest.mark.parametrize(
    ("outputs", "depth", "stored", "dtype"),
    [
        (200, 700, "none", torch.bfloat16),
        (200, 700, "full", torch.float32),
        (200, 700, "int8", torch.float16),
        (4096, 900, "int8", torch.bfloat16),
        (200, 13000, "none", torch.float16),
        (200, 13000, "full", torch.float16),
    ],
)
def test_products_of_a_counted_list(target, outputs, depth, stored, dtype):
    """Also where blocks have a multiprocessor each and two teams; however few entries there are of room for many."""
    weight = entries("normal", outputs, depth, seed=2).to(dtype)
    weight[:, -1] = torch.nan
    carrying = (entries("normal", 1, outputs, seed=3),) if stored == "none" else along(outputs, 500, dtype, stored)
    for count in (0, 1, depth // 2, depth - 1):
        values, indices, number = counted(count, depth, depth)
        operands = ([column_major(weight)], [None], *carrying, *[None] * (3 - len(carrying)), number)
        result = target("sparse_linear", values, indices, *operands)
        values, indices = values[:, :count], indices[:, :count]
        check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], *carrying)


def test_a_count_of_more_than_there_is_room_for(target):
    values, indices, _ = counted(40, 40, 60)
    weight = column_major(entries("normal", 64, 60, seed=1))
    operands = (values, indices, [weight], [None], None, None, None)
    assert torch.equal(target("sparse_linear", *operands, torch.tensor([99])), target("sparse_linear", *operands))


@settings(max_examples=examples(8))
@given(products(), st.floats(0, 1))
@pytest.mark.slow_in_triton
def test_products_of_what_is_above(target, problem, share):
    x, gain, score, _, weights, biases, residual = problem
    x, residual = entries("tied", 1, x.shape[1], seed=x.shape[1]), None if residual is None else residual[:1]
    if residual is not None and not len(residual):
        residual = None
    columns = [column_major(weight) for weight in weights]
    for name, source, exact in (
        ("above", (x,), x.double()),
        ("rms_norm_above", (x, gain, EPS), rms_norm_reference(x.double(), gain, EPS)),
    ):
        threshold = between(exact.abs() * (1 if score is None else score.double()), share)
        chosen = kept(target(name, *source, threshold, score))
        result = target(f"{name}_linear", *source, threshold, score, columns, biases, residual)
        check(result, sparse_linear_reference, chosen, weights, biases, residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "outputs"), [(4096, 256), (700, 192), (12000, 192)])
def test_entries_of_any_kind(target, kind, width, outputs):
    """Of many columns only those that are kept are read: all others are NaN."""
    x = entries(kind, 1, width, seed=1)
    for threshold in (0.0, 0.7, math.inf):
        values, indices = kept(target("above", x, threshold, None))
        weight = torch.full((outputs, width), torch.nan)
        weight[:, indices[0].long()] = entries("normal", outputs, values.shape[1], seed=2)
        result = target("above_linear", x, threshold, None, [column_major(weight)], [None], None)
        if values.isfinite().all():
            check(result, sparse_linear_reference, (values, indices), [weight], [None], None)
        elif values.isnan().any():
            assert result.isnan().all()
        else:
            assert not result.isfinite().any()


@pytest.mark.parametrize(
    ("outputs", "carried", "width", "stored", "dtype"),
    [
        *((192, 500, 700, "full", torch.float32), (180, 90, 3001, "int8", torch.bfloat16)),
        *((192, 3, 11008, "full", torch.bfloat16), (192, 4000, 64, "int8", torch.float16)),
        *((4096, 640, 900, "int8", torch.float16), (192, 64, 16384, "int8", torch.float32)),
        *((192, 64, 16385, "full", torch.float16), (192, 64, 14336, "int8", torch.float16)),
    ],
)
def test_an_adapter_is_read_meanwhile(target, outputs, carried, width, stored, dtype):
    """By blocks of a small GPU or a large one, or beside a list that another kernel has made."""
    x, score = entries("normal", 1, width, seed=0), entries("normal", width, seed=1).abs().to(dtype)
    weight, bias = entries("normal", outputs, width, seed=2).to(dtype), entries("normal", outputs, seed=6).to(dtype)
    carrying = along(outputs, carried, dtype, stored)
    for threshold in (math.inf, 0.4, 0.0):
        chosen = kept(above_reference(x, threshold, score))
        poisoned = torch.full_like(weight, torch.nan)
        poisoned[:, chosen[1][0].long()] = weight[:, chosen[1][0].long()]
        result = target("above_linear", x, threshold, score, [column_major(poisoned)], [bias], *carrying)
        check(result, sparse_linear_reference, chosen, [weight], [bias], *carrying)


def test_entries_of_one_half_alone(target):
    """All above are in every second row of 32, as where a basis orders the entries of each head."""
    x, weight = torch.zeros(1, 2048), entries("normal", 192, 2048, seed=1).half()
    x[0].view(-1, 2, 32)[:, 0] = entries("normal", 32, 32, seed=2) + 9
    chosen = kept(above_reference(x, 1.0))
    result = target("above_linear", x, 1.0, None, [column_major(weight)], [None], None)
    check(result, sparse_linear_reference, chosen, [weight], [None], None)


def test_every_entry_and_none(target):
    x, weight = entries("normal", 1, 700, seed=0), entries("normal", 96, 700, seed=1).half()
    residual, columns = entries("normal", 1, 96, seed=2), [column_major(weight)]
    every = target("above_linear", x, 0.0, None, columns, [None], residual)
    listed = torch.arange(700, dtype=torch.int32)[None]
    check(every, sparse_linear_reference, (x.double(), listed), [weight], [None], residual)
    for name, source in (("above_linear", (x,)), ("rms_norm_above_linear", (x, None, EPS))):
        assert torch.equal(target(name, *source, math.inf, None, columns, [None], residual), residual)
    assert not target("rms_norm_above_swiglu", x, None, EPS, math.inf, None, columns * 2, [None, None]).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_that_are_not_finite_show(target, bad):
    x, weight = entries("normal", 1, 700, seed=0), column_major(entries("normal", 96, 700, seed=1))
    x[0, 650] = bad
    for name, source in (("above_linear", (x,)), ("rms_norm_above_linear", (x, None, EPS))):
        assert not target(name, *source, 1e30, None, [weight], [None], None).isfinite().any()


@pytest.mark.parametrize(
    ("width", "outputs", "dtype"),
    [(700, 96, torch.float16), (512, 1000, torch.bfloat16), (64, 7, torch.float32), (9000, 96, torch.float16)],
)
def test_swiglu_of_what_is_above(target, width, outputs, dtype):
    x, gain = entries("normal", 1, width, seed=1), entries("normal", width, seed=2)
    threshold = between(rms_norm_reference(x.double(), gain, EPS).abs(), 0.5)
    weights = [(entries("normal", outputs, width, seed=i) / width**0.5).to(dtype) for i in (3, 4)]
    biases = [None, entries("normal", outputs, seed=5).to(dtype)]
    columns = [column_major(weight) for weight in weights]
    result = target("rms_norm_above_swiglu", x, gain, EPS, threshold, None, columns, biases)
    product = [doubled(weight) for weight in weights], [doubled(bias) for bias in biases]
    expected = rms_norm_above_swiglu_reference(x.double(), gain.double(), EPS, threshold, None, *product)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "source", "files"),
    [
        (16384, "AS_IS", ["above_linear.cu"]),
        (16385, "AS_IS", ["above.cu", "sparse_linear.cu"]),
        (8192, "NORMED", ["above_linear.cu"]),
        (8193, "NORMED", ["above.cu", "sparse_linear.cu"]),
    ],
)
def test_lengths_that_blocks_compare_for_themselves(emulator, monkeypatch, width, source, files):
    launched = []
    monkeypatch.setattr(launch, "machine", emulator.machine)
    monkeypatch.setattr(launch, "launch", lambda device, source, *_: launched.append(source))
    x, product = torch.ones(1, width), ([torch.empty_strided((192, width), (1, 192))], [None])
    if source == "AS_IS":
        kernels.above_linear(x, 0.5, None, *product)
    else:
        kernels.rms_norm_above_linear(x, None, EPS, 0.5, None, *product)
    assert launched == files


def test_what_cannot_be_compared(target):
    weight, x = torch.zeros(3, 4), torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"larosa\.ops\.column_major"):
        target("above_linear", x, 0.5, None, [weight], [None])
    with pytest.raises(ValueError, match="score must be"):
        target("above_linear", x, 0.5, torch.zeros(3), [column_major(weight)], [None])
    with pytest.raises(ValueError, match="gate and up must be two matrices"):
        target("rms_norm_above_swiglu", x, None, EPS, 0.5, None, [column_major(weight)], [None])
    for bad in (torch.ones(1, dtype=torch.int32), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="count must be int64"):
            target("sparse_linear", x, x.int(), [column_major(weight)], [None], None, None, None, bad)


def test_vectors_too_long_for_a_block(emulator):
    with pytest.raises(LarosaError, match="at most 32768 entries, not 40000: set LAROSA_CUDA_KERNELS=triton"):
        kernels.above(torch.zeros(1, 40000), 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4096, 11008, 14336])
def test_replays_of_a_graph_follow_the_count(width):
    """One graph, whatever the count, gives the bits of separate calls; results are poisoned in between."""
    device, ops = torch.device("cuda"), torch.ops.larosa
    x, residual = torch.empty(1, width, device=device), torch.randn(1, 4096, device=device)
    score = torch.rand(width, device=device)
    product = [column_major(torch.randn(4096, width, device=device).half())], [None]
    adapter = column_major(torch.randn(4096, 4096, device=device).half())

    def run():
        *chosen, count = ops.above(x, 0.5, score)
        listed = ops.sparse_linear(*chosen, *product, residual, adapter, None, count)
        fused = ops.above_linear(x, 0.5, score, *product, residual, adapter)
        normed = ops.rms_norm_above_linear(x, score, 1e-5, 0.5, score, *product, residual)
        return [*chosen, count, listed, fused, normed]

    x.normal_()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for make in (
        x.normal_,
        x.zero_,
        lambda: x.zero_()[0, -1].fill_(1e4),
        lambda: x.fill_(1e4),
        lambda: x.normal_()[0, 3].fill_(torch.nan),
        lambda: x.normal_()[0, 5].fill_(torch.inf),
        x.normal_,
    ):
        make()
        for result in captured:
            result.fill_(-1)
        expected = [result.clone() for result in run()]
        assert_replays_repeat(graph, captured, expected)
        chosen = kept(above_reference(x.cpu(), 0.5, score.cpu()))
        assert expected[2].item() == chosen[0].shape[1]
        if chosen[0].isfinite().all():
            given = [[weight.cpu() for weight in product[0]], [None], residual.cpu(), adapter.cpu()]
            for result in expected[3:5]:
                check(result.cpu(), sparse_linear_reference, chosen, *given)
