"""Entries with several columns, each with a score of its own: what is kept bit by bit, products against float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.formats import Int4
from larosa.ops import column_major
from larosa.ops.cuda import kernels, launch
from larosa.ops.cuda.low_bit import low_bit_site
from larosa.ops.low_bit import low_bit_linear_reference
from larosa.ops.low_bit_site import low_bit_site_reference
from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.select import above_reference
from tests.examples import examples

from .cases import DTYPES, Target, assert_replays_repeat, doubled, entries, seeded
from .test_above import THRESHOLDS, between, kept
from .test_low_bit import FORMS, assert_near, drawn
from .test_products import digits
from .test_rows import alone
from .test_selection import KINDS, same
from .test_small_gpus import SMALL_RTX
from .test_top_k_linear import EPS


def scores(columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Many of them 0, 1 or 2: an entry's columns are often alike."""
    plain = entries("normal", columns, seed=seed).abs()
    return torch.where(torch.rand(columns, generator=seeded(seed)) < 0.5, plain.round(), plain).to(dtype)


@settings(max_examples=examples(40))
@given(st.data())
def test_above_is_the_reference_bit_by_bit(target, data):
    width = data.draw(st.integers(1, 300) | st.sampled_from([1023, 1024]), label="width")
    each, rows = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(0, 3), label="rows")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    x = entries(data.draw(st.sampled_from(KINDS)), rows, width, seed=seed)
    score = scores(each * width, data.draw(st.sampled_from(DTYPES)), seed)
    threshold = data.draw(st.sampled_from(THRESHOLDS))
    *found, count = target("above", x, threshold, score)
    *expected, number = above_reference(x, threshold, score)
    assert torch.equal(count, number)
    same(found, expected)


@pytest.mark.parametrize("kind", ["normal", "special"])
@pytest.mark.parametrize(("width", "each"), [(4096, 2), (4097, 3), (12001, 2), (28672, 2)])
def test_long_vectors(target, kind, width, each):
    """Of the longer ones a thread does not hold all scores."""
    x, score = entries(kind, 1, width, seed=width), scores(each * width, torch.bfloat16, 1)
    for threshold in (0.0, 0.7, math.inf):
        *found, count = target("above", x, threshold, score)
        *expected, number = above_reference(x, threshold, score)
        assert torch.equal(count, number)
        same(found, expected)


def test_fused_selections_are_above_of_what_they_fuse(target):
    x, gate_up = entries("tied", 2, 301, seed=1), entries("normal", 2, 602, seed=2)
    gain, score = entries("normal", 301, seed=3).bfloat16(), scores(602, torch.float32, 4)
    for name, source, exact in (
        ("silu_mul_above", (gate_up,), silu_mul_reference(gate_up.double())),
        ("rms_norm_above", (x, None, EPS), rms_norm_reference(x.double(), None, EPS)),
        ("rms_norm_above", (x, gain, EPS), rms_norm_reference(x.double(), gain, EPS)),
    ):
        threshold = between(exact.abs().repeat(1, 2) * score, 0.5)
        values, indices, count = target(name, *source, threshold, score)
        expected = above_reference(exact, threshold, score)
        assert torch.equal(count, expected[2])
        assert torch.equal(indices, expected[1])
        torch.testing.assert_close(values.double(), expected[0], rtol=1e-5, atol=1e-30)


def test_nan_keeps_all_columns(target):
    x, score = entries("normal", 1, 300, seed=0), scores(600, torch.float32, 1)
    x[0, 7], score[7] = torch.nan, 0.0
    values, indices = kept(target("above", x, math.inf, score))
    assert values.isnan().all()
    assert indices.tolist() == [[7, 307]]


@pytest.mark.parametrize("size", [0, 3, 12, 15])
def test_scores_of_another_number_of_columns(target, size):
    x, score = torch.zeros(1, 8), torch.zeros(size)
    for name, source in (("above", x), ("silu_mul_above", torch.zeros(1, 16))):
        with pytest.raises(ValueError, match=f"score must have 8 entries, or a multiple of it, not {size}"):
            target(name, source, 0.5, score)


def test_products_of_the_weights_own_format_have_one_score_an_entry(target):
    x, product = torch.zeros(1, 8), ([column_major(torch.zeros(3, 8))], [None])
    for name, source in (("above_linear", (x,)), ("rms_norm_above_linear", (x, None, EPS))):
        with pytest.raises(ValueError, match=r"score must be a contiguous .* vector of 8 entries"):
            target(name, *source, 0.5, torch.zeros(16), *product)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize(("depth", "each", "rows"), [(300, 2, 1), (71, 3, 3), (1201, 2, 5)])
def test_products_of_all_columns(target, form, depth, each, rows):
    """Bit by bit that of a list of them, for each row by itself."""
    values = entries("normal", rows, depth, seed=1)
    residual = entries("normal", rows, 147, seed=2)
    problem = replace(drawn(form, [64, 50, 33], each * depth, values, None, beside=16), residual=residual)
    result = target("low_bit_linear", *problem.arguments())
    problem.check(result)
    listed = values.repeat(1, each), torch.arange(each * depth, dtype=torch.int32).repeat(rows, 1)
    assert torch.equal(result, target("low_bit_linear", *listed, *problem.weights, residual))
    rest = None, *problem.weights
    assert torch.equal(result, alone(target, "low_bit_linear", values, rest, residual))
    if rows == 1:
        counted = replace(problem, count=torch.tensor([depth + 20]))
        counted.check(target("low_bit_linear", *counted.arguments()))


SITES: dict[str, dict[str, Any]] = {
    "norm": {"eps": 1e-5},
    "norm, gate and up": {"eps": 1e-5, "swiglu": True},
    "thresholds": {"share": 0.5},
    "thresholds of a norm": {"eps": 1e-5, "share": 0.7},
    "thresholds of a norm, gate and up": {"eps": 1e-5, "share": 0.5, "swiglu": True},
    "everything": {},
}


def site(
    target: Target, name: str, form: Any, width: int, each: int, rows: int = 1, added: tuple[Any, ...] = ()
) -> None:
    """Checks a site of SITES against float64; whoever reads columns that are not kept reads NaN."""
    options = {"eps": None, "share": None, "swiglu": False, **SITES[name]}
    eps, share, swiglu = options["eps"], options["share"], options["swiglu"]
    x, gain = entries("normal", rows, width, seed=1), entries("normal", width, seed=2).half()
    score = scores(each * width, torch.bfloat16, 3)
    problem = drawn(form, [256] * 2 if swiglu else [512], each * width, x, None, beside=16)
    threshold = None
    if share is not None:
        exact = x.double() if eps is None else rms_norm_reference(x.double(), gain, eps)
        threshold = between(exact.abs().repeat(1, each) * score, share)
        read = torch.zeros(each * width, dtype=torch.bool)
        for row in exact:
            read[kept(above_reference(row[None], threshold, score))[1][0].long()] = True
        assert not read.all()
    first = (x, gain, eps, score, None, threshold, swiglu)
    exact = low_bit_site_reference(
        *(x.double(), gain.double(), eps, score.double(), None, threshold, swiglu),
        *(*problem.weights, *(part.double() if part.dtype == torch.float32 else part for part in added)),
    )
    if share is not None:
        for scale in problem.scales:
            scale[~read] = torch.nan
    result = target("low_bit_site", *first, *problem.weights, *added)
    assert_near(result, exact)
    for row in range(rows if rows > 1 else 0):
        single = target(
            "low_bit_site", x[row, None], *first[1:], *problem.weights, *(part[row, None] for part in added)
        )
        assert torch.equal(result[row, None], single)


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_sites(target, form, name):
    residual = () if SITES[name].get("swiglu") else (entries("normal", 2, 512, seed=4),)
    site(target, name, form, 601, 2, 2, residual)


@pytest.mark.parametrize("name", ["thresholds", "thresholds of a norm"])
@pytest.mark.parametrize("width", [600, 2048, 9000])
def test_sites_of_three_columns(target, name, width):
    """The longest of x as it is are divided among blocks before they look, of a norm one kernel selects for all."""
    site(target, name, Int4(64), width, 3)


@pytest.mark.parametrize("stored", ["int8", torch.float32])
@pytest.mark.parametrize(("name", "width"), [("thresholds", 600), ("thresholds", 8000), ("everything", 600)])
def test_sites_with_an_adapter(target, name, width, stored):
    """Beside an adapter blocks look at all entries of the short ones."""
    along = digits(512, 106, 4), entries("normal", 512, seed=5)
    if stored != "int8":
        along = (column_major(entries("normal", 512, 90, seed=4)),)
    site(target, name, FORMS[0], width, 2, added=(entries("normal", 1, 90, seed=2), *along))


def test_the_longest_vectors_that_blocks_compare_for_themselves(emulator, monkeypatch):
    """Lists of 32,768 columns and more, in the shared memory of a large GPU's block; slow, so without products."""
    monkeypatch.setattr(launch, "launch", emulator.launch)
    monkeypatch.setattr(launch, "machine", emulator.machine)
    target = Target(kernels, torch.device("cpu"))
    site(target, "thresholds", FORMS[0], 16384, 2)
    site(target, "thresholds of a norm", FORMS[0], 8192, 2)


@pytest.mark.parametrize(
    ("width", "eps", "files"),
    [
        (16384, None, ["above_linear.cu"]),
        (16385, None, ["above.cu", "sparse_linear.cu"]),
        (8192, 1e-5, ["above_linear.cu"]),
        (8193, 1e-5, ["above.cu", "sparse_linear.cu"]),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_lengths_that_blocks_compare_for_themselves(emulator, monkeypatch, width, eps, files, small):
    """None where a block has little memory."""
    launched: list[str] = []
    monkeypatch.setattr(emulator, "gpu", SMALL_RTX if small else emulator.gpu)
    monkeypatch.setattr(launch, "machine", emulator.machine)
    monkeypatch.setattr(launch, "launch", lambda device, source, *_: launched.append(source))
    problem = drawn(Int4(128), [32], 2 * width, torch.ones(1, width), None)
    low_bit_site(problem.values, None, eps, torch.ones(2 * width), None, 0.5, False, *problem.weights)
    assert launched == (["above.cu", "sparse_linear.cu"] if small else files)


def test_every_column_and_none(target):
    x, residual, score = entries("normal", 1, 600, seed=1), entries("normal", 1, 512, seed=2), torch.ones(1200)
    problem = replace(drawn(FORMS[0], [512], 1200, x, None), residual=residual)
    for eps in (None, 1e-5):
        first = x, None, eps, score, None
        assert torch.equal(target("low_bit_site", *first, math.inf, False, *problem.weights, residual), residual)
        every = target("low_bit_site", *first, 0.0, False, *problem.weights, residual)
        exact = low_bit_site_reference(x.double(), *first[1:4], None, None, False, *problem.weights, residual.double())
        assert_near(every, exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(target, bad):
    x, score = entries("normal", 1, 600, seed=1), torch.ones(1200)
    x[0, 577] = bad
    problem = drawn(FORMS[0], [512], 1200, x, None)
    for threshold in (1e30, None):
        for eps in (None, 1e-5):
            result = target("low_bit_site", x, None, eps, score, None, threshold, False, *problem.weights)
            assert not result.isfinite().any()


@pytest.mark.parametrize(
    ("columns", "score", "k", "complaint"),
    [
        (10, None, None, "score must have 10 entries, one a column, where an entry has 2 of them"),
        (10, torch.ones(5), None, "score must be a contiguous .* vector of 10 entries"),
        (5, torch.ones(10), None, "score must be a contiguous .* vector of 5 entries"),
        (12, torch.ones(12), None, r"x must be \[B, 12\], or \[B, 12 / m\] where an entry has m columns, not \(1, 5\)"),
        (10, torch.ones(10), 3, "entries that k keeps have one column each: codes must be of 5, not 10"),
    ],
)
def test_sites_that_do_not_fit(target, columns, score, k, complaint):
    problem = drawn(Int4(32), [40], columns, torch.ones(1, 5), None)
    with pytest.raises(ValueError, match=complaint):
        target("low_bit_site", problem.values, None, None, score, k, None if k else 0.5, False, *problem.weights)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "outputs", "swiglu"),
    [
        (4096, [4096, 1024, 1024], False),
        (4096, [14336] * 2, True),
        (14336, [4096], False),
        (8192, [8192, 1024, 1024], False),
        (28672, [8192], False),
    ],
)
def test_sizes_of_models_in_a_graph(width, outputs, swiglu):
    """One graph, whatever is kept, gives the bits of separate calls; results are poisoned in between."""
    torch.manual_seed(0)
    device, ops = torch.device("cuda"), torch.ops.larosa
    x, score = torch.empty(1, width, device=device), torch.rand(2 * width, device=device)
    codes = [torch.randint(0, 256, (2 * width, n // 2), dtype=torch.uint8, device=device) for n in outputs]
    scales = [torch.rand(2 * width, n // 64, device=device).bfloat16() / 64 for n in outputs]
    weights = codes, scales, outputs, 64, "int4", [None] * len(outputs)
    residual = None if swiglu else torch.randn(1, sum(outputs), device=device)

    def sites(eps, threshold):
        return x, None, eps, score, None, threshold, swiglu, *weights, residual

    def run():
        fused = [ops.low_bit_site(*sites(eps, threshold)) for eps in (None, EPS) for threshold in (0.5, None)]
        return [*fused, ops.low_bit_linear(x, None, *weights, residual), *ops.above(x, 0.5, score)]

    x.normal_()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for make in (x.normal_, x.zero_, lambda: x.zero_()[0, -1].fill_(1e4), lambda: x.fill_(1e4), x.normal_):
        make()
        for result in captured:
            result.fill_(-1)
        expected = [result.clone() for result in run()]
        assert_replays_repeat(graph, captured, expected)
        *chosen, count = above_reference(x, 0.5, score)
        assert torch.equal(expected[-1], count)
        same(expected[-3:-1], chosen)
        listed = low_bit_linear_reference(chosen[0].double(), chosen[1], *weights, doubled(residual), count)
        every = low_bit_linear_reference(x.double(), None, *weights, doubled(residual))
        # Of one column more or less an output is off by 1e-3, and by 5e-6 for the rounding of so long sums.
        assert_near(expected[4], every, 5e-5)
        for result, exact in zip(expected[:2], (listed, every), strict=True):
            assert_near(result, silu_mul_reference(exact) if swiglu else exact, 5e-5)
