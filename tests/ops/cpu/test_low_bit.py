"""`low_bit_linear` bit by bit against whole numbers in PyTorch, and against float64 by what rounding may do."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.formats import FORMATS, GROUPS, ColumnFormat, Int4
from larosa.ops.cpu import library
from larosa.ops.low_bit import BLOCK, low_bit_linear_in_integers, low_bit_linear_reference
from tests.examples import examples

from .cases import DTYPES, ISAS, Chance, bits, chances, doubled
from .test_products import selection

ops = torch.ops.larosa

#: About bytes, vectors, groups and what is taken of a column at a time.
OUTPUTS = st.one_of(st.integers(1, 70), st.sampled_from([95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 513, 1030]))


@dataclass
class Problem:
    """What `low_bit_linear` is given."""

    values: torch.Tensor
    indices: torch.Tensor | None
    codes: list[torch.Tensor]
    scales: list[torch.Tensor]
    outputs: list[int]
    group: int
    form: str
    biases: list[torch.Tensor | None]
    residual: torch.Tensor | None = None
    count: torch.Tensor | None = None

    def given(self) -> list[object]:
        return list(vars(self).values())


def apart(x: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows with so many other elements between them, as rows of one matrix beside another's are."""
    return torch.cat([x, x.new_full((len(x), gap), 85)], dim=1)[:, : x.shape[1]]


def low_bit(
    chance: Chance, depth: int, outputs: list[int], of: ColumnFormat
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and scales of random matrices."""
    codes, scales = [], []
    for size in outputs:
        q = torch.randint(of.lowest, of.highest + 1, (depth, size), generator=chance.generator)
        gap = int(torch.randint(0, 3, (), generator=chance.generator))
        codes.append(apart(of.pack(q), gap))
        scales.append(apart(chance.tensor(depth, of.groups(size), dtype=torch.bfloat16), gap))
    return codes, scales


@st.composite
def problems(draw, *kinds: str):
    chance = draw(chances(*kinds))
    rows, depth = draw(st.integers(0, 3)), draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 130, 300])))
    outputs = draw(st.lists(OUTPUTS, min_size=1, max_size=3))
    group = draw(st.sampled_from(GROUPS))
    form = draw(st.sampled_from(list(FORMATS)))
    codes, scales = low_bit(chance, depth, outputs, FORMATS[form](group))
    k = draw(st.one_of(st.sampled_from([0, depth]), st.integers(0, min(depth, BLOCK + 1)), st.integers(0, depth)))
    values, indices = selection(chance, rows, depth, k)
    if draw(st.booleans()):  # all columns, of which an entry has as many as the next
        each = draw(st.sampled_from([each for each in (1, 2, 3) if depth % each == 0]))
        values, indices = chance.tensor(rows, depth // each), None
    biases = [chance.maybe(n, dtype=draw(st.sampled_from(DTYPES))) for n in outputs]
    problem = Problem(values, indices, codes, scales, outputs, group, form, biases, chance.maybe(rows, sum(outputs)))
    if rows == 1 and indices is not None and draw(st.booleans()):
        problem.count = torch.tensor([draw(st.integers(0, k))])
    return chance, problem


@settings(max_examples=examples(300))
@given(problems())
def test_every_instruction_set_gives_the_bits_of_whole_numbers(problem):
    chance, given = problem
    result = chance.run(ops.low_bit_linear, *given.given())
    assert result.dtype == torch.float32
    assert torch.equal(bits(result), bits(low_bit_linear_in_integers(*given.given())))


@settings(max_examples=examples(150))
@given(problems("normal", "integer", "wild"))
def test_results_are_off_by_no_more_than_a_block_s_unit(problem):
    chance, given = problem
    result = chance.run(ops.low_bit_linear, *given.given())
    exact = replace(
        given,
        values=given.values.double(),
        biases=[doubled(bias) for bias in given.biases],
        residual=doubled(given.residual),
    )
    values, indices, depth = given.values, given.indices, len(given.codes[0])
    if indices is None:
        values = values[:, torch.arange(depth) % values.shape[1]]
        indices = torch.arange(depth).expand(values.shape)
    count = indices.shape[1] if given.count is None else int(given.count)
    bounds = []
    for value, index in zip(values.double()[:, :count], indices[:, :count].long(), strict=True):
        for codes, scales, size in zip(given.codes, given.scales, given.outputs, strict=True):
            kind = FORMATS[given.form]
            q = kind(given.group).unpack(codes[index], size).double().abs()
            scaled = (value[:, None] * scales[index].double()).abs()
            bound = torch.zeros(size, dtype=torch.float64)
            for at in range(0, count, BLOCK):
                block = slice(at, at + BLOCK)
                unit = scaled[block].amax(dim=0).repeat_interleave(given.group)[:size] / (
                    127 if kind is Int4 else 16256
                )
                bound += 0.501 * unit * q[block].sum(dim=0)
            # And the sums of blocks in float32.
            whole = scaled.repeat_interleave(given.group, dim=1)[:, :size] * q
            bounds.append(bound + (count / BLOCK + 4) * 2**-22 * whole.sum(dim=0))
    bound = torch.cat([torch.empty(0, dtype=torch.float64), *bounds]).view(result.shape)
    biases = zip(given.outputs, given.biases, strict=True)
    added = torch.cat([torch.zeros(size) if bias is None else bias.float() for size, bias in biases])
    bound += 2**-22 * (added.abs() + (0 if given.residual is None else given.residual.abs())) + 1e-26
    assert ((result.double() - low_bit_linear_reference(*exact.given())).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", FORMATS.values())
def test_columns_that_are_not_kept_do_not_show(isa, kind):
    library.set_isa(isa)
    chance = Chance(torch.Generator().manual_seed(0), "normal", 1)
    (codes,), (scales,) = low_bit(chance, 200, [330], kind(64))
    values, indices = selection(chance, 1, 200, 90)
    given = Problem(values, indices, [codes], [scales], [330], 64, kind.name, [None])
    before = ops.low_bit_linear(*given.given())
    assert before.isfinite().all()
    skipped = torch.ones(200, dtype=torch.bool)
    skipped[indices[0].long()] = False
    codes[skipped] = ~codes[skipped]
    scales[skipped] = math.nan
    assert torch.equal(ops.low_bit_linear(*given.given()), before)
    scales[indices[0, 7], 2] = math.nan
    assert ops.low_bit_linear(*given.given()).isnan().nonzero()[:, 1].tolist() == list(range(128, 192))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 41, 300])
def test_two_planes_give_the_bits_of_whole_numbers(isa, threads, depth):
    """All columns of every entry, and those whose scores reach; large enough for threads to share."""
    library.set_isa(isa)
    chance = Chance(torch.Generator().manual_seed(4), "normal", threads)
    codes, scales = low_bit(chance, 2 * depth, [1500, 1030], Int4(64))
    weights = codes, scales, [1500, 1030], 64, Int4.name, [None, chance.tensor(1030)]
    x = chance.tensor(2, depth)
    every = chance.run(ops.low_bit_linear, x, None, *weights)
    assert torch.equal(bits(every), bits(low_bit_linear_in_integers(x, None, *weights)))
    listed = x.repeat(1, 2), torch.arange(2 * depth, dtype=torch.int32).repeat(2, 1)
    assert torch.equal(every, chance.run(ops.low_bit_linear, *listed, *weights))
    # The second column of an entry is read where its first one is, and not always.
    score = torch.cat([torch.ones(depth), torch.full((depth,), 0.4)])
    values, indices, count = ops.above(x, 0.5, score)
    kept = chance.run(ops.low_bit_linear, values, indices, *weights, None, count)
    assert torch.equal(bits(kept), bits(low_bit_linear_in_integers(values, indices, *weights, None, count)))
    read = torch.cat([x * (x.abs() > 0.5), x * ((0.4 * x).abs() > 0.5)], dim=1).double()
    dense = [Int4(64).dequantize(*columns, torch.float64) for columns in zip(codes, scales, [1500, 1030], strict=True)]
    exact = torch.cat([read @ weight for weight in dense], dim=1)
    exact[:, 1500:] += weights[-1][1].double()
    assert (kept - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", FORMATS.values())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_an_entry_that_is_not_finite_spoils_all_outputs(isa, kind, bad):
    library.set_isa(isa)
    chance = Chance(torch.Generator().manual_seed(1), "normal", 1)
    codes, scales = low_bit(chance, 40, [70, 33], kind(32))
    for scale in scales:
        scale[5] = -17.0  # 3e38 overflows
    codes[0][5] = kind(32).pack(torch.zeros(1, 70))[0]  # whole numbers of nothing: infinity times 0 is NaN
    x = chance.tensor(1, 40)
    x[0, 5] = bad
    given = Problem(x, None, codes, scales, [70, 33], 32, kind.name, [None, None])
    assert ops.low_bit_linear(*given.given()).isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, 1e-40])
def test_next_to_nothing_is_nothing(isa, tiny):
    library.set_isa(isa)
    chance = Chance(torch.Generator().manual_seed(2), "normal", 1)
    codes, scales = low_bit(chance, 20, [40], Int4(32))
    bias, residual = chance.tensor(40), chance.tensor(1, 40)
    given = Problem(torch.full((1, 20), tiny), None, codes, scales, [40], 32, Int4.name, [bias], residual)
    assert torch.equal(ops.low_bit_linear(*given.given()), bias + residual)


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_whole_numbers_do_not_overflow(isa):
    library.set_isa(isa)
    for kind, q in ((form, q) for form in FORMATS.values() for q in (form.lowest, form.highest)):
        codes = kind(32).pack(torch.full((16, 50), q))
        scales = torch.ones(16, 2, dtype=torch.bfloat16)
        for sign in (1.0, -1.0):
            x = torch.full((1, 16), sign * 127)
            result = ops.low_bit_linear(x, None, [codes], [scales], [50], 32, kind.name, [None])
            assert result.tolist() == [[sign * 127 * 16 * q] * 50]
