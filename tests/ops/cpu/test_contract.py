"""What PyTorch and callers may rely on: schemas, errors, the same bits on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.formats import FORMATS, ColumnFormat, Int4
from larosa.ops import column_major
from larosa.ops.cpu import library
from larosa.ops.low_bit import LowBitWeights
from tests.examples import examples

from .cases import ISAS, bits

ops = torch.ops.larosa


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cache(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return random(2, 6, 8).to(dtype), random(2, 6, 8, seed=1).to(dtype)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randint(-127, 128, (2, 2, 6, 8), dtype=torch.int8)
    return keys, values


def scales() -> torch.Tensor:
    return random(2, 6, 2).abs().bfloat16()


def low_bit(depth: int, *outputs: int, form: ColumnFormat | None = None) -> LowBitWeights:
    """So many random matrices, of 4 bits in groups of 32 where nothing is said."""
    form = form or Int4(32)
    generator = torch.Generator().manual_seed(0)
    codes = [
        form.pack(torch.randint(form.lowest, form.highest + 1, (depth, size), generator=generator)) for size in outputs
    ]
    scales = [random(depth, form.groups(size)).bfloat16() for size in outputs]
    return LowBitWeights(codes, scales, list(outputs), form.group, form.name)


CALLS = {
    "rms_norm": lambda: (random(2, 9), random(9), 1e-5),
    "silu_mul": lambda: (random(2, 10),),
    "top_k": lambda: (random(2, 9), 4, random(9).abs()),
    "rms_norm_top_k": lambda: (random(2, 9), None, 1e-5, 4),
    "silu_mul_top_k": lambda: (random(2, 10), 3),
    "above": lambda: (random(2, 9), 0.5, random(9).abs()),
    "rms_norm_above": lambda: (random(2, 9), random(9), 1e-5, 0.5, random(9).abs()),
    "silu_mul_above": lambda: (random(2, 10), 0.5, random(5).abs()),
    "above of two columns each": lambda: (random(2, 9), 0.5, random(18).abs()),
    "rms_norm_above of two columns each": lambda: (random(2, 9), None, 1e-5, 0.5, random(18).abs()),
    "silu_mul_above of three columns each": lambda: (random(2, 10), 0.5, random(15).abs()),
    "linear": lambda: (random(2, 9), [random(3, 9), random(4, 9)], [None, random(4)], random(2, 7)),
    "adapt": lambda: (random(2, 9), (20 * random(3, 11)).to(torch.int8), random(3)),
    "sparse_linear": lambda: (
        random(1, 2),
        torch.tensor([[3, 5]], dtype=torch.int32),
        [column_major(random(3, 9))],
        [None],
    ),
    "low_bit_linear": lambda: (
        random(1, 2),
        torch.tensor([[3, 5]], dtype=torch.int32),
        *low_bit(9, 7, 4),
        [None, random(4)],
        random(1, 11),
        torch.tensor([1]),
    ),
    "low_bit_linear of two columns each": lambda: (random(2, 9), None, *low_bit(18, 7, 4), [None, None]),
    "attend": lambda: (random(1, 64), *cache(), torch.tensor([3]), random(6, 8), random(6, 8), None, None, 0.0, 1.0, 0),
    "attend of digits": lambda: (random(1, 64), *digits(), torch.tensor([3]), *[None] * 4, 0.0, 1.0, 0, scales()),
    "attend of several caches": lambda: (
        random(3, 64),
        *(torch.stack([x, x]) for x in cache()),
        torch.tensor([3, 4, 3]),
        *[None] * 4,
        0.0,
        1.0,
        0,
        None,
        torch.tensor([0, 0, 1]),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name.split()[0]).default, CALLS[name]())


@settings(max_examples=examples(60))
@given(st.sampled_from(ISAS), st.integers(0, 1000), st.integers(1, 6000), st.integers(1, 3), st.booleans())
def test_results_have_the_same_bits_on_any_number_of_threads(isa, seed, outputs, rows, shared):
    library.set_isa(isa)
    library.share_threads(library.load(), shared)
    weight = random(outputs, 300, seed=seed).to(torch.bfloat16)
    digits, scale = (20 * random(outputs, 320, seed=seed)).to(torch.int8), random(outputs)
    columns = column_major(weight)
    x, residual = random(rows, 300, seed=seed), random(rows, outputs)
    values, indices = ops.top_k(x, 150)
    qkv, keys, cached = random(1, 8 * 64, seed=seed), random(2, 2000, 64), random(2, 2000, 64)
    position = torch.tensor([outputs % 2000])
    rounded = [(10 * x).to(torch.int8) for x in (keys, cached)]
    counts = random(2, 2000, 2).abs().bfloat16()
    few_bits = [(*low_bit(300, outputs, outputs, form=form(64)), [None] * 2) for form in FORMATS.values()]

    def results() -> list[torch.Tensor]:
        return [
            ops.linear(x, [weight], [None], residual),
            ops.adapt(x, digits, scale),
            ops.sparse_linear(values, indices, [columns], [None], residual),
            *(ops.low_bit_linear(values, indices, *weights) for weights in few_bits),
            *(ops.low_bit_linear(x, None, *weights) for weights in few_bits),
            ops.low_bit_linear(x[:, :100], None, *few_bits[-1]),
            ops.attend(qkv, keys, cached, position, None, None, None, None, 0.0, 0.125, 0),
            ops.attend(qkv, *rounded, position, None, None, None, None, 0.0, 0.125, 0, counts),
        ]

    torch.set_num_threads(1)
    alone = results()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for one, other in zip(alone, results(), strict=True):
            assert torch.equal(bits(one), bits(other))


def test_rows_of_few_bits_are_computed_as_if_alone():
    x = random(4, 50)
    values, indices = ops.top_k(x, 20)
    few_bits = *low_bit(50, 70), [None]
    narrow, narrow_dense = ops.low_bit_linear(values, indices, *few_bits), ops.low_bit_linear(x, None, *few_bits)
    above = ops.above(x[:, :25], 0.7, torch.cat([torch.ones(25), random(25).abs()]))
    counted = ops.low_bit_linear(*above[:2], *few_bits, None, above[2])
    halves = ops.low_bit_linear(x[:, :25], None, *few_bits)
    for row in range(4):
        one = slice(row, row + 1)
        assert torch.equal(narrow[one], ops.low_bit_linear(values[one], indices[one], *few_bits))
        assert torch.equal(narrow_dense[one], ops.low_bit_linear(x[one], None, *few_bits))
        assert torch.equal(halves[one], ops.low_bit_linear(x[one, :25], None, *few_bits))
        alone = ops.low_bit_linear(above[0][one], above[1][one], *few_bits, None, above[2][one])
        assert torch.equal(counted[one], alone)


@settings(max_examples=examples(200))
@given(
    st.sampled_from(ISAS),
    st.integers(0, 1000),
    st.integers(2, 9),
    st.sampled_from([1, 31, 32, 33, 300, 700]),
    st.sampled_from([1, 70, 255, 600]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.05, 0.5, 1.0]),
    st.integers(1, 3),
)
def test_rows_of_a_batch_are_computed_as_if_alone(isa, seed, rows, depth, outputs, dtype, share, threads):
    library.set_isa(isa)
    torch.set_num_threads(threads)
    weights = [random(outputs, depth, seed=seed).to(dtype), random(outputs + 9, depth, seed=seed + 1).to(dtype)]
    columns, biases = [column_major(weight) for weight in weights], [None, random(outputs + 9)]
    x, residual = random(rows, depth, seed=seed), random(rows, 2 * outputs + 9)
    values, indices = ops.top_k(x, int(share * depth))
    above = ops.above(x, 1 - share)
    norm = ops.rms_norm_above(x, None, 1e-5, 1 - share)
    digits, scale = (20 * random(outputs, depth, seed=seed)).to(torch.int8), random(outputs)
    together = (
        ops.linear(x, weights, biases, residual),
        ops.adapt(x, digits, scale),
        ops.sparse_linear(values, indices, columns, biases, residual),
        ops.sparse_linear(*above[:2], columns, biases, residual, count=above[2]),
        *above,
        *norm,
    )
    for row in range(rows):
        one = slice(row, row + 1)
        counted = ops.above(x[one], 1 - share)
        alone = (
            ops.linear(x[one], weights, biases, residual[one]),
            ops.adapt(x[one], digits, scale),
            ops.sparse_linear(values[one], indices[one], columns, biases, residual[one]),
            ops.sparse_linear(*counted[:2], columns, biases, residual[one], count=counted[2]),
            *counted,
            *ops.rms_norm_above(x[one], None, 1e-5, 1 - share),
        )
        assert [torch.equal(whole[one], part) for whole, part in zip(together, alone, strict=True)] == [True] * 10
    torch.set_num_threads(1)


def test_a_column_that_only_another_row_keeps_does_not_show():
    weight = random(70, 8)
    weight[:, 5] = float("nan")
    indices = torch.tensor([[1, 5], [1, 6]], dtype=torch.int32)
    result = ops.sparse_linear(random(2, 2), indices, [column_major(weight)], [None])
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def test_indices_in_any_order():
    values, order = random(3, 100), torch.stack([torch.randperm(100) for _ in range(3)])
    ascending = order.sort(dim=1)
    weight = [column_major(random(40, 100))]
    expected = ops.sparse_linear(values.gather(1, ascending.indices), ascending.values.int(), weight, [None])
    found = ops.sparse_linear(values, order.int(), weight, [None])
    torch.testing.assert_close(found, expected)


def test_strided_activations_are_read_right():
    x, weight = random(3, 40)[:, ::2], random(5, 20)
    assert torch.equal(ops.linear(x, [weight], [None]), ops.linear(x.contiguous(), [weight], [None]))
    assert torch.equal(ops.rms_norm(x, None, 1e-5), ops.rms_norm(x.contiguous(), None, 1e-5))


def test_a_row_or_column_of_nothing():
    values, indices = ops.top_k(random(2, 8), 0)
    bias, residual = random(5), random(2, 5)
    result = ops.sparse_linear(values, indices, [column_major(random(5, 8))], [bias], residual)
    assert torch.equal(result, residual + bias)
    # A list of nothing, which PyTorch keeps no memory for, is not that of all columns.
    assert torch.equal(ops.low_bit_linear(values, indices, *low_bit(8, 5), [bias], residual), residual + bias)


def in_halves(x: torch.Tensor) -> torch.Tensor:
    """The same values, each beginning in the middle of an element."""
    half = x.element_size() // 2
    raw = bytearray(b"\0" * half + x.contiguous().view(torch.uint8).numpy().tobytes() + b"\0" * half)
    return torch.frombuffer(raw, dtype=x.dtype, offset=half, count=x.numel()).view(x.shape)


W = random(6, 8)
A = torch.ones(6, 9, dtype=torch.int8)
C = column_major(W)
V, I = random(1, 2), torch.tensor([[1, 7]], dtype=torch.int32)  # noqa: E741 - indices
BAD = {
    "row-major weights": (lambda: ops.sparse_linear(V, I, [W], [None]), ValueError, "larosa.ops.column_major"),
    "column-major weights": (lambda: ops.linear(random(1, 8), [C], [None]), ValueError, "contiguous"),
    "double activations": (lambda: ops.linear(random(1, 8).double(), [W], [None]), ValueError, "float32"),
    "double weights": (lambda: ops.linear(random(1, 8), [W.double()], [None]), ValueError, "float64"),
    "weights of two dtypes": (lambda: ops.linear(random(1, 8), [W, W.half()], [None] * 2), ValueError, "one dtype"),
    "wrong depth": (lambda: ops.linear(random(1, 9), [W], [None]), ValueError, "9 entries"),
    "no weights": (lambda: ops.linear(random(1, 9), [], []), ValueError, "no weights"),
    "wrong bias": (lambda: ops.linear(random(1, 8), [W], [random(5)]), ValueError, "bias"),
    "wrong residual": (lambda: ops.linear(random(1, 8), [W], [None], random(1, 5)), ValueError, "residual"),
    "an adapter": (lambda: ops.sparse_linear(V, I, [C], [None], None, C), ValueError, "by rows"),
    "an adapter by columns": (
        lambda: ops.adapt(random(1, 8), column_major(A), random(6)),
        ValueError,
        "contiguous int8",
    ),
    "an adapter of floats": (lambda: ops.adapt(random(1, 8), W, random(6)), ValueError, "contiguous int8"),
    "a narrow adapter": (lambda: ops.adapt(random(1, 10), A, random(6)), ValueError, "vectors of 10 entries"),
    "a wide adapter": (lambda: ops.adapt(random(1, 4), A, random(6)), ValueError, "vectors of 4 entries"),
    "a short scale": (lambda: ops.adapt(random(1, 8), A, random(5)), ValueError, "scale"),
    "half a scale": (lambda: ops.adapt(random(1, 8), A, in_halves(random(6))), ValueError, "middle"),
    "long indices": (lambda: ops.sparse_linear(V, I.long(), [C], [None]), ValueError, "int32"),
    "unlike indices": (lambda: ops.sparse_linear(V, I[:, :1], [C], [None]), ValueError, "indices"),
    "too large index": (lambda: ops.sparse_linear(V, I + 1, [C], [None]), IndexError, "column"),
    "negative index": (lambda: ops.sparse_linear(V, I - 2, [C], [None]), IndexError, "column"),
    "vector for a batch": (lambda: ops.rms_norm(random(8), None, 0.0), ValueError, r"\[B, D\]"),
    "wrong gain": (lambda: ops.rms_norm(random(1, 8), random(7), 0.0), ValueError, "gain"),
    "wrong score": (lambda: ops.top_k(random(1, 8), 2, random(1, 8)), ValueError, "score"),
    "odd gate_up": (lambda: ops.silu_mul(random(1, 7)), ValueError, "side by side"),
    "a count of two rows": (
        lambda: ops.sparse_linear(random(2, 2), I.expand(2, -1), [C], [None], count=torch.ones(1, dtype=torch.int64)),
        ValueError,
        r"int64 \[2\], one a row",
    ),
    "a count of 32 bits": (
        lambda: ops.sparse_linear(V, I, [C], [None], count=torch.ones(1, dtype=torch.int32)),
        ValueError,
        "count must be int64",
    ),
    "half elements": (lambda: ops.linear(random(1, 8), [in_halves(W)], [None]), ValueError, "middle"),
}
(CODES,), (SCALES,), *_ = low_bit(8, 6)
LOW_BIT = {
    "codes of floats": ({"codes": [SCALES]}, ValueError, "codes of int4 must be uint8"),
    "codes of other columns": ({"codes": [CODES[:7]], "scales": [SCALES]}, ValueError, r"scales must be \[7, 1\]"),
    "codes of other outputs": ({"outputs": [7]}, ValueError, r"codes must be \[8, 4\]"),
    "codes by rows": ({"codes": [CODES.t().contiguous().t()]}, ValueError, "each column in one piece"),
    "scales of another dtype": ({"scales": [SCALES.half()]}, ValueError, "scales must be bfloat16"),
    "half a scale": ({"scales": [in_halves(SCALES)]}, ValueError, "middle"),
    "codes of another format": ({"form": "int8"}, ValueError, "codes of int8 must be int8"),
    "codes of other bits": ({"form": "int6"}, ValueError, r"codes must be \[8, 24\]"),
    "an unknown format": ({"form": "int7"}, ValueError, "form must be one of int8, int6, int5, int4, not int7"),
    "a group of another size": ({"group": 48}, ValueError, "group must be one of 32, 64, 128, not 48"),
    "a bias of another size": ({"biases": [random(5)]}, ValueError, "bias"),
    "no matrices": ({"codes": [], "scales": [], "outputs": [], "biases": []}, ValueError, "no weights"),
    "too large index": ({"indices": I + 1}, IndexError, "column"),
    "no indices": (
        {"indices": None, "values": random(1, 3)},
        ValueError,
        r"without indices values must be \[B, 8\], or \[B, D\] with 8 a multiple of D, not \[1, 3\]",
    ),
    "more values than columns": ({"indices": None, "values": random(1, 16)}, ValueError, r"not \[1, 16\]"),
    "values of nothing": ({"indices": None, "values": random(1, 0)}, ValueError, r"not \[1, 0\]"),
    "a count of no list": ({"indices": None, "count": torch.tensor([1])}, ValueError, "give indices"),
    "a column of a third plane": (
        {"indices": torch.tensor([[7, 8]], dtype=torch.int32)},
        IndexError,
        "not that of a column",
    ),
    "wrong residual": ({"residual": random(1, 5)}, ValueError, "residual"),
}
ATTEND = {
    "double cache": (dict(zip(("keys", "values"), cache(torch.float64), strict=True)), "float64"),
    "two dtypes": ({"values": cache(torch.bfloat16)[1]}, "one dtype"),
    "strided cache": ({"keys": random(2, 6, 16)[:, :, ::2]}, "contiguous"),
    "qkv of another width": ({"qkv": random(1, 63)}, "qkv"),
    "heads that do not share": ({"qkv": random(1, 56)}, "qkv"),
    "cos alone": ({"cos": random(6, 8)}, "both"),
    "short cos": ({"cos": random(5, 8), "sin": random(5, 8)}, "cos"),
    "digits without scales": (dict(zip(("keys", "values"), digits(), strict=True)), "int8 with scales"),
    "scales of floats": ({"scales": scales()}, "int8 with scales"),
    "wide scales": (dict(zip(("keys", "values"), digits(), strict=True)) | {"scales": scales().float()}, "bfloat16"),
    "scales of other positions": (
        dict(zip(("keys", "values"), digits(), strict=True)) | {"scales": scales()[:, 1:]},
        r"\[2, 6, 2\]",
    ),
    "int position": ({"position": torch.tensor([1], dtype=torch.int32)}, "int64"),
    "a position for two rows": ({"qkv": random(2, 64)}, r"position must be contiguous int64 \[2\], one a row"),
    "a number of one cache": ({"cache": torch.tensor([0])}, r"contiguous \[C, K, T, d\]"),
    "several caches without numbers": (dict.fromkeys(("keys", "values"), random(1, 2, 6, 8)), r"\[K, T, d\]"),
    "a number for two rows": (
        dict.fromkeys(("keys", "values"), random(1, 2, 6, 8)) | {"cache": torch.tensor([0, 0])},
        r"cache must be contiguous int64 \[1\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_computed_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", LOW_BIT)
def test_what_low_bits_cannot_be_multiplied_with_is_refused(name):
    usual = {
        "values": V,
        "indices": I,
        "codes": [CODES],
        "scales": [SCALES],
        "outputs": [6],
        "group": 32,
        "form": "int4",
    }
    changed, error, message = LOW_BIT[name]
    with pytest.raises(error, match=message):
        ops.low_bit_linear(**(usual | {"biases": [None]} | changed))


@pytest.mark.parametrize("name", ATTEND)
def test_what_cannot_be_attended_to_is_refused(name):
    keys, values = cache()
    usual = {"qkv": random(1, 64), "keys": keys, "values": values, "position": torch.tensor([1])}
    usual |= {"cos": None, "sin": None, "q_gain": None, "k_gain": None, "eps": 0.0, "scale": 1.0, "window": 0}
    changed, message = ATTEND[name]
    with pytest.raises(ValueError, match=message):
        ops.attend(**(usual | changed))
