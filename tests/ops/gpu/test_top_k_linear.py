"""Selections with their products against the selection alone, which is tested bit by bit, and a float64 product."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from larosa.ops import column_major
from larosa.ops.cuda import kernels, launch
from larosa.ops.embed import embed_reference
from larosa.ops.greedy import greedy_reference
from larosa.ops.linear import sparse_linear_reference
from larosa.ops.select import top_k_reference
from larosa.ops.top_k_linear import (
    rms_norm_top_k_linear_reference,
    rms_norm_top_k_swiglu_reference,
    top_k_linear_reference,
)
from tests.examples import examples

from .cases import DTYPES, entries
from .test_products import check, digits
from .test_selection import KINDS

EPS = 1e-5
BOARD = torch.zeros(1, dtype=torch.int64)


@st.composite
def problems(draw):
    """x and what makes its entries, k, and matrices of which the last may have a bias."""
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(DTYPES))
    rows, width = draw(st.integers(0, 2)), draw(st.integers(1, 1500))
    outputs = draw(st.lists(st.sampled_from([8, 24, 100, 256, 3]), min_size=1, max_size=3))
    x = entries(draw(st.sampled_from(["normal", "tied", "zero"])), rows, width, seed=seed)
    vectors = [
        entries("normal", width, seed=seed + i).abs().to(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None
        for i in (1, 2)
    ]
    weights = [entries("normal", n, width, seed=seed + i).to(dtype) for i, n in enumerate(outputs)]
    biases = [None] * (len(outputs) - 1) + [entries("normal", outputs[-1], seed=seed).to(dtype)]
    residual = entries("normal", rows, sum(outputs), seed=seed + 3) if draw(st.booleans()) else None
    return x, *vectors, draw(st.integers(0, width)), weights, biases, residual


@settings(max_examples=examples(25))
@given(problems())
@pytest.mark.slow_in_triton
def test_products_of_what_is_selected(target, problem):
    x, gain, score, k, weights, biases, residual = problem
    columns = [column_major(weight) for weight in weights]
    for name, source in (("top_k", (x,)), ("rms_norm_top_k", (x, gain, EPS))):
        values, indices = target(name, *source, k, score)
        result = target(f"{name}_linear", *source, k, score, columns, biases, residual)
        check(result, sparse_linear_reference, (values.double(), indices), weights, biases, residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "outputs", "k"), [(4096, 256, 2048), (3000, 2000, 1), (2049, 40, 2048), (9000, 8, 99)]
)
def test_entries_of_any_kind(target, kind, width, outputs, k):
    """Of many columns only those that are kept are read: all others are NaN."""
    x = entries(kind, 1, width, seed=1)
    values, indices = target("top_k", x, k, None)
    weight = torch.full((outputs, width), torch.nan)
    weight[:, indices[0].long()] = entries("normal", outputs, k, seed=2)
    result = target("top_k_linear", x, k, None, [column_major(weight)], [None], None)
    sound = values.isfinite().all()
    assert sound or kind == "special"
    if sound:
        check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], None)
    elif values.isnan().any():
        assert result.isnan().all()


@pytest.mark.parametrize("outputs", [192, 4096])
def test_a_block_without_an_entry_norms_what_it_finishes(target, outputs):
    """Two blocks share each tile of so many outputs, on a small GPU or a large one, and one of them has no entry."""
    x, weight = 30 * entries("normal", 1, 700, seed=0), entries("normal", outputs, 700, seed=1).half()
    values, indices = target("rms_norm_top_k", x, None, EPS, 1, None)
    result = target("rms_norm_top_k_linear", x, None, EPS, 1, None, [column_major(weight)], [None], None)
    check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], None)


def along(outputs, width, dtype, stored, seed=3):
    """A residual, and an adapter in full or in digits with scales."""
    residual = entries("normal", 1, width, seed=seed)
    if stored == "full":
        return residual, column_major(entries("normal", outputs, width, seed=seed + 1).to(dtype)), None
    return residual, digits(outputs, width + width // 16, seed + 1), entries("normal", outputs, seed=seed + 2).to(dtype)


@pytest.mark.usefixtures("selects_from_short_ones")
@pytest.mark.parametrize("stored", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "carried", "width", "k"),
    [
        *((192, 500, 700, 350), (180, 90, 3001, 1000), (192, 3, 11008, 5504), (192, 4000, 64, 64), (192, 40, 30, 1)),
        *((4096, 640, 900, 7), (192, 64, 16384, 16000), (192, 64, 16385, 8000), (192, 1, 300, 150)),
    ],
)
@pytest.mark.one_of(3)
def test_one_block_selects_for_all(target, dtype, stored, outputs, carried, width, k):
    """Of a small GPU or a large one, or each product for itself; columns that are not kept are NaN."""
    x, score = entries("normal", 1, width, seed=0), entries("normal", width, seed=1).abs().to(dtype)
    _, indices = top_k_reference(x, k, score)
    weight = torch.full((outputs, width), torch.nan)
    weight[:, indices[0].long()] = entries("normal", outputs, k, seed=2)
    weight, bias, board = weight.to(dtype), entries("normal", outputs, seed=6).to(dtype), BOARD.clone()
    carrying = along(outputs, carried, dtype, stored)
    for _ in range(2):
        result = target("top_k_linear", x, k, score, [column_major(weight)], [bias], *carrying, board)
        values = x.gather(1, indices.long()).double()
        check(result, sparse_linear_reference, (values, indices), [weight], [bias], *carrying)
        assert board == 0


@pytest.mark.usefixtures("selects_from_short_ones")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "k"), [(2049, 2048), (3000, 1), (9000, 4500), (700, 699)])
def test_one_block_selects_entries_of_any_kind(target, kind, width, k):
    """It keeps what a selection of its own keeps."""
    x = entries(kind, 1, width, seed=1)
    values, indices = target("top_k", x, k, None)
    weight = torch.full((192, width), torch.nan)
    weight[:, indices[0].long()] = entries("normal", 192, k, seed=2)
    carrying = along(192, 50, torch.float32, "full")
    result = target("top_k_linear", x, k, None, [column_major(weight)], [None], *carrying, BOARD.clone())
    sound = values.isfinite().all()
    assert sound or kind == "special"
    if sound:
        check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], *carrying)
    elif values.isnan().any():
        assert result.isnan().all()


@pytest.mark.usefixtures("selects_from_short_ones")
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3000), st.data())
def test_one_block_selects_from_vectors_of_any_size(target, width, data):
    k, outputs = data.draw(st.integers(0, width)), data.draw(st.integers(161, 192))
    x = entries(data.draw(st.sampled_from(["normal", "tied", "zero"])), 1, width, seed=width)
    weight, carrying = entries("normal", outputs, width, seed=1), along(outputs, 30, torch.float32, "full")
    values, indices = top_k_reference(x, k, None)
    result = target("top_k_linear", x, k, None, [column_major(weight)], [None], *carrying, BOARD.clone())
    check(result, sparse_linear_reference, (values.double(), indices), [weight], [None], *carrying)


@pytest.mark.parametrize(("width", "one_selects"), [(12288, False), (12289, True), (16384, True), (16385, False)])
def test_lengths_of_which_one_block_selects_for_all(emulator, monkeypatch, width, one_selects):
    """Those of which it takes less time, up to what its threads hold."""
    files = []
    monkeypatch.setattr(launch, "machine", emulator.machine)
    monkeypatch.setattr(launch, "launch", lambda device, source, *_: files.append(source))
    weight = torch.empty_strided((192, width), (1, 192))
    kernels.top_k_linear(torch.ones(1, width), 9, None, [weight], [None], torch.ones(1, 1), weight[:, :1], None, BOARD)
    assert files == (["top_k_linear_cut.cu"] if one_selects else ["select.cu", "sparse_linear.cu"])


def test_every_entry_and_none(target):
    x, weight = entries("normal", 1, 700, seed=0), entries("normal", 96, 700, seed=1).half()
    residual = entries("normal", 1, 96, seed=2)
    every = target("top_k_linear", x, 700, None, [column_major(weight)], [None], residual)
    listed = torch.arange(700, dtype=torch.int32)[None]
    check(every, sparse_linear_reference, (x.double(), listed), [weight], [None], residual)
    assert torch.equal(target("top_k_linear", x, 0, None, [column_major(weight)], [None], residual), residual)


def test_what_cannot_be_selected_and_multiplied(target):
    weight, x = torch.zeros(3, 4), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="cannot keep 5 of 4 entries"):
        target("top_k_linear", x, 5, None, [column_major(weight)], [None], None)
    with pytest.raises(ValueError, match=r"larosa\.ops\.column_major"):
        target("top_k_linear", x, 2, None, [weight], [None], None)
    with pytest.raises(ValueError, match="residual must be"):
        target("top_k_linear", x, 2, None, [column_major(weight)], [None], x)
    with pytest.raises(ValueError, match="board must be one int64, zero"):
        target("top_k_linear", x, 2, None, [column_major(weight)], [None], x, weight[:, :3], None, x)
    with pytest.raises(ValueError, match="score must be"):
        target("top_k_linear", x, 2, torch.zeros(3), [column_major(weight)], [None], None)
    with pytest.raises(ValueError, match="gate and up must be two matrices of one size, not of \\[3, 2\\] outputs"):
        target(
            "rms_norm_top_k_swiglu",
            x,
            None,
            EPS,
            2,
            None,
            [column_major(weight), column_major(weight[:2])],
            [None, None],
        )


@pytest.mark.parametrize(("width", "outputs", "k", "rows"), [(700, 96, 350, 1), (512, 1000, 300, 1), (64, 7, 9, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_what_is_selected(target, dtype, width, outputs, k, rows):
    x, gain = entries("normal", rows, width, seed=1), entries("normal", width, seed=2)
    weights = [(entries("normal", outputs, width, seed=i) / width**0.5).to(dtype) for i in (3, 4)]
    biases = [None, entries("normal", outputs, seed=5).to(dtype)]
    columns = [column_major(weight) for weight in weights]
    result = target("rms_norm_top_k_swiglu", x, gain, EPS, k, None, columns, biases)
    expected = target("silu_mul", target("rms_norm_top_k_linear", x, gain, EPS, k, None, columns, biases, None))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_as_pytorch_sees_them(dtype):
    """Of operators that only a GPU has, for which a CPU's test of all operators' contracts does not ask."""
    x, k, weights = entries("normal", 2, 30, seed=0), 9, [entries("normal", 8, 30, seed=i).to(dtype) for i in (1, 2)]
    product, tokens = ([column_major(weight) for weight in weights], [None, None]), torch.tensor([1, 0, 2])
    calls = {
        "top_k_linear": (top_k_linear_reference, (x, k, None, *product)),
        "rms_norm_top_k_linear": (rms_norm_top_k_linear_reference, (x, None, EPS, k, None, *product, x[:, :16])),
        "rms_norm_top_k_swiglu": (rms_norm_top_k_swiglu_reference, (x, None, EPS, k, None, *product)),
        "greedy": (greedy_reference, (x,)),
        "embed": (embed_reference, (weights[0], tokens)),
    }
    for name, (reference, arguments) in calls.items():
        expected = reference(*arguments)
        with FakeTensorMode() as mode:
            faked = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            result = getattr(torch.ops.larosa, name)(*faked)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype), name
