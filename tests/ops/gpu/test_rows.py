"""Several rows at once: each gives the bits that it gives alone, whatever reads its weights."""

import pytest
import torch

from larosa.formats import Int4, Int8
from larosa.ops import column_major
from larosa.ops.linear import linear_reference, sparse_linear_reference

from .cases import bits, entries, seeded
from .test_products import check


def alone(target, name, x, rest, residual=None, *more):
    """The operator of each row of x by itself."""
    rows = [
        target(name, x[row, None], *rest, *([] if residual is None else [residual[row, None]]), *more)
        for row in range(len(x))
    ]
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("rows", "dtype", "outputs"),
    [
        (2, torch.bfloat16, [96, 40]),
        (4, torch.bfloat16, [96, 40]),
        (11, torch.float16, [200, 1]),  # more than are read for at once
        (5, torch.float32, [509]),
    ],
)
def test_products_that_read_everything(target, dtype, outputs, rows):
    depth = 700
    weights = [entries("normal", n, depth, seed=n).to(dtype) for n in outputs]
    biases = [entries("normal", n, seed=n).to(dtype) if n % 2 else None for n in outputs]
    x, residual = entries("special" if rows == 4 else "normal", rows, depth, seed=rows), None
    if rows % 2:
        residual = entries("normal", rows, sum(outputs), seed=1)
    columns = [column_major(weight) for weight in weights]
    for name, rest in (("linear", (weights, biases)), ("sparse_linear", (None, columns, biases))):
        result = target(name, x, *rest, residual)
        assert torch.equal(bits(result), bits(alone(target, name, x, rest, residual)))
        if rows != 4:
            check(result, linear_reference, (x.double(),), weights, biases, residual)


@pytest.mark.parametrize(
    ("rows", "dtype", "outputs", "width", "depth", "scaled"),
    [
        (5, torch.bfloat16, 200, 500, 700, True),  # whose blocks are alone on a multiprocessor
        (3, torch.float32, 200, 3, 5000, False),
        (8, torch.float16, 4096, 70, 90, False),
    ],
)
def test_an_adapter_along(target, rows, dtype, outputs, width, depth, scaled):
    values, residual = entries("normal", rows, depth, seed=0), entries("normal", rows, width, seed=1)
    weight = column_major(entries("normal", outputs, depth, seed=2).to(dtype))
    along = [column_major(entries("normal", outputs, width, seed=3).to(dtype))]
    if scaled:
        digits = torch.randint(-128, 128, (width + min(width, 16), outputs), generator=seeded(3), dtype=torch.int8)
        along = [digits.t(), entries("normal", outputs, seed=4).to(dtype)]
    rest = (None, [weight], [None])
    result = target("sparse_linear", values, *rest, residual, *along)
    assert torch.equal(result, alone(target, "sparse_linear", values, rest, residual, *along))
    every = torch.arange(depth, dtype=torch.int32).expand(rows, -1)
    check(result, sparse_linear_reference, (values.double(), every), [weight], [None], residual, *along)


@pytest.mark.usefixtures("selects_from_short_ones")
@pytest.mark.parametrize("outputs", [200, 192])
@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("rms_norm_top_k_linear", "residual"),
        ("rms_norm_top_k_swiglu", None),
        ("top_k_linear", "residual"),
        ("top_k_linear", "adapter"),
        ("top_k_linear", "adapter and board"),
        ("rms_norm_above_linear", "residual"),
        ("rms_norm_above_swiglu", None),
        ("above_linear", "residual"),
        ("above_linear", "adapter"),
    ],
)
def test_sites_that_select(target, name, added, outputs):
    rows, width = 3, 600
    x, along = entries("tied", rows, width, seed=rows), entries("normal", rows, 90, seed=7)
    weight, score = (
        column_major(entries("normal", outputs, width, seed=0).half()),
        entries("normal", width, seed=1).abs(),
    )
    adapter = column_major(entries("normal", outputs, 90, seed=2).half())
    board = torch.zeros(1, dtype=torch.int64)
    more = {
        None: (),
        "residual": (entries("normal", rows, outputs, seed=4),),
        "adapter": (along, adapter),
        "adapter and board": (along, adapter, None, board),
    }[added]
    matrices = ([weight] * 2, [None] * 2) if name.endswith("swiglu") else ([weight], [None])
    norm = (entries("normal", width, seed=3), 1e-5) if name.startswith("rms_norm") else ()
    rest = (*norm, 300 if "top_k" in name else 0.9, score, *matrices)
    assert torch.equal(target(name, x, *rest, *more), alone(target, name, x, rest, *more))
    assert board.item() == 0


@pytest.mark.parametrize(("rows", "form"), [(3, Int4(32)), (7, Int8(32))])
@pytest.mark.parametrize("call", ["count", "threshold", "everything", "linear", "linear with an adapter"])
def test_weights_of_few_bits(target, rows, form, call):
    depth, outputs = 300, [256, 64]
    whole = [torch.randint(form.lowest, form.highest + 1, (depth, n), generator=seeded(n)) for n in outputs]
    stored = [form.pack(q) for q in whole]
    scales = [entries("normal", depth, n // 32, seed=n).bfloat16() for n in outputs]
    weights = stored, scales, outputs, form.group, form.name, [None, entries("normal", 64, seed=5)]
    x, residual = entries("normal", rows, depth, seed=0), entries("normal", rows, 320, seed=1)
    adapter = entries("normal", rows, 40, seed=2), column_major(entries("normal", 320, 40, seed=3))
    gain, score = entries("normal", depth, seed=4), entries("normal", depth, seed=6).abs()
    if call.startswith("linear"):
        name, rest = "low_bit_linear", (None, *weights)
    else:
        kept = {"count": (score, 100, None), "threshold": (score, None, 0.8), "everything": (None, None, None)}[call]
        name, rest = "low_bit_site", (gain, 1e-5, *kept, False, *weights)
    added = (adapter[0], None, adapter[1]) if call == "linear with an adapter" else (residual,)
    assert torch.equal(target(name, x, *rest, *added), alone(target, name, x, rest, *added))


def test_counted_lists(target):
    x = entries("normal", 3, 500, seed=0)
    weight = column_major(entries("normal", 70, 500, seed=1).bfloat16())
    for name, rest in (("above", ()), ("rms_norm_above", (None, 1e-5))):
        values, indices, count = target(name, x, *rest, 0.7, None)
        result = target("sparse_linear", values, indices, [weight], [None], None, None, None, count)
        assert len(set(count.tolist())) > 1
        for row in range(3):
            found = target(name, x[row, None], *rest, 0.7, None)
            for one, several in zip(found, (values, indices, count), strict=True):
                assert torch.equal(one[0], several[row])
            one = target("sparse_linear", *found[:2], [weight], [None], None, None, None, found[2])
            assert torch.equal(one[0], result[row])


@pytest.mark.parametrize(
    ("dtype", "heads", "size"),
    [
        (torch.float32, (1, 1), 16),
        (torch.bfloat16, (6, 2), 80),
        (torch.int8, (4, 2), 64),
    ],
)
@pytest.mark.parametrize("caches", [None, [0, 0, 2, 0, 1, 2]])
def test_attention(target, dtype, heads, size, caches):
    """Rows of one text, in any order, see those before them as those of several texts see none of the others'."""
    (query_heads, key_heads), length, positions = heads, 300, [200, 198, 40, 199, 0, 39]
    qkv = entries("normal", 6, (query_heads + 2 * key_heads) * size, seed=0)
    shape = ([3] if caches else []) + [key_heads, length]
    if dtype == torch.int8:
        before = [torch.randint(-127, 128, (*shape, size), generator=seeded(i)).to(dtype) for i in (1, 2)]
        before.append(entries("normal", *shape, 2, seed=3).abs().bfloat16() / 50)
    else:
        before = [*(entries("normal", *shape, size, seed=i).to(dtype) for i in (1, 2)), None]
    cache = None if caches is None else torch.tensor(caches)
    tables, gain = [entries("normal", length, size, seed=i) for i in (4, 5)], entries("normal", size, seed=6)
    for window in (0, 7):
        rest = *tables, gain, gain, 1e-6, size**-0.5, window
        together, apart = ([None if x is None else x.clone() for x in before] for _ in range(2))
        result = target("attend", qkv, *together[:2], torch.tensor(positions), *rest, together[2], cache)
        for row in sorted(range(6), key=positions.__getitem__):
            of_text = apart if caches is None else [None if x is None else x[caches[row]] for x in apart]
            at = torch.tensor([positions[row]])
            one = target("attend", qkv[row, None], *of_text[:2], at, *rest, of_text[2])
            assert torch.equal(result[row], one[0]), (row, window)
        for one, several in zip(apart, together, strict=True):
            assert one is None or torch.equal(one.view(torch.uint8), several.view(torch.uint8))


def test_rows_outside_the_cache_leave_the_others_alone(target):
    keys, values = torch.zeros(2, 2, 1, 4, 8)
    positions, caches = torch.tensor([0, 4, -1, 1, 1]), torch.tensor([0, 0, 1, 2, 1])
    result = target("attend", torch.ones(5, 24), keys, values, positions, *[None] * 4, 0.0, 1.0, 0, None, caches)
    assert result.isnan().all(dim=1).tolist() == [False, True, True, True, False]
    assert keys.any(dim=-1).nonzero().tolist() == [[0, 0, 0], [1, 0, 1]]


def test_more_rows_than_a_block_has_room_for(emulator):
    from larosa.ops.cuda import kernels

    keys, values = torch.zeros(2, 1, 16, 8)
    with pytest.raises(ValueError, match="attend takes up to 8 rows, not 9"):
        kernels.attend(torch.ones(9, 24), keys, values, torch.arange(9), *[None] * 4, 0.0, 1.0, 0)
