"""Products with codes of 8 and 4 bits, alone and with what selects for them, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.errors import LarosaError
from larosa.formats import GROUPS, ColumnFormat, Int4, Int5, Int6, Int8
from larosa.ops import column_major
from larosa.ops.cuda import kernels as cuda_kernels
from larosa.ops.low_bit import low_bit_linear_reference
from larosa.ops.low_bit_site import low_bit_site_reference
from tests.examples import examples

from .cases import DTYPES, doubled, entries, seeded
from .test_products import EPS, digits

FORMS = [Int4(32), Int8(128), Int4(64), Int8(32)]
#: Whole pieces of 16 bytes, others, and more than the GPU that stands in for a large one has blocks for.
OUTPUTS = [[256], [64, 50, 33], [1], [2300], [32, 64]]
#: By which the largest term of a sum is larger than with the highest code: those of 4 bits count as 16 to 31 at first.
LARGER = {4: 31 / 7, 5: 16 / 15, 6: 32 / 31, 8: 1.0}


@dataclass(frozen=True)
class Given:
    """What `low_bit_linear` is given."""

    form: ColumnFormat
    values: torch.Tensor
    indices: torch.Tensor | None
    codes: list[torch.Tensor]
    scales: list[torch.Tensor]
    outputs: list[int]
    biases: list[torch.Tensor | None]
    residual: torch.Tensor | None = None
    count: torch.Tensor | None = None
    adapter: torch.Tensor | None = None
    adapter_scale: torch.Tensor | None = None

    @property
    def weights(self) -> tuple[Any, ...]:
        """The matrices."""
        return self.codes, self.scales, self.outputs, self.form.group, self.form.name, self.biases

    def arguments(self) -> tuple[Any, ...]:
        added = self.residual, self.count, self.adapter, self.adapter_scale
        return self.values, self.indices, *self.weights, *added

    def check(self, result: torch.Tensor) -> None:
        """Within the bound that holds for any order of summation."""
        exact = self.each(torch.Tensor.double)
        sizes = [(len(codes), outputs) for codes, outputs in zip(self.codes, self.outputs, strict=True)]
        highest = [self.form.pack(torch.full(size, self.form.highest)) for size in sizes]
        largest = replace(self.each(lambda x: x.double().abs()), codes=highest, scales=[x.abs() for x in self.scales])
        bound = LARGER[self.form.bits] * low_bit_linear_reference(*largest.arguments())
        terms = len(self.codes[0]) if self.indices is None else self.values.shape[1]
        assert result.dtype == torch.float32
        error = (result.double() - low_bit_linear_reference(*exact.arguments())).abs()
        assert (error <= (terms + 8) * EPS * bound + 1e-44).all()

    def each(self, change: Any) -> Given:
        """With other floats, scales as they are."""

        def changed(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else change(x)

        return replace(
            self,
            values=change(self.values),
            biases=list(map(changed, self.biases)),
            residual=changed(self.residual),
            adapter_scale=changed(self.adapter_scale),
        )


def drawn(form: ColumnFormat, outputs: list[int], depth: int, values, indices, seed: int = 0, beside: int = 0) -> Given:
    """Random codes and scales, in poisoned memory that has others `beside` them."""
    codes, scales = [], []
    for i, size in enumerate(outputs):
        q = torch.randint(form.lowest, form.highest + 1, (depth, size), generator=seeded(seed + i))
        codes.append(in_more(form.pack(q), beside))
        scales.append(in_more(entries("normal", depth, form.groups(size), seed=seed + i).bfloat16(), beside % 7))
    return Given(form, values, indices, codes, scales, outputs, [None] * len(outputs))


def in_more(x: torch.Tensor, beside: int) -> torch.Tensor:
    """The same columns, so many elements into larger ones."""
    whole = torch.full((len(x), x.shape[1] + 2 * beside), torch.nan if x.is_floating_point() else 0x5A, dtype=x.dtype)
    whole[:, beside : beside + x.shape[1]] = x
    return whole[:, beside : beside + x.shape[1]]


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**31))
    form = draw(st.sampled_from([Int8, Int4]))(draw(st.sampled_from(GROUPS)))
    outputs, rows, depth = draw(st.sampled_from(OUTPUTS)), draw(st.integers(0, 2)), draw(st.sampled_from([1, 70, 300]))
    k = draw(st.sampled_from([0, 1, depth // 2, depth]))
    values = entries(draw(st.sampled_from(["normal", "tied", "zero", "huge"])), rows, k, seed=seed)
    order = torch.rand(rows, depth, generator=seeded(seed)).argsort(1)[:, :k]
    indices = None if k == depth and draw(st.booleans()) else order.sort(1).values.int()
    each = 1 if indices is not None else draw(st.sampled_from([1, 2, 3]))  # columns of an entry
    given = drawn(form, outputs, each * depth, values, indices, seed, draw(st.sampled_from([0, 0, 1, 16])))
    biases = [entries("normal", n, seed=seed).to(draw(st.sampled_from(DTYPES))) for n in outputs]
    biases = [bias if draw(st.booleans()) else None for bias in biases]
    residual = entries("normal", rows, sum(outputs), seed=seed) if draw(st.booleans()) else None
    count = torch.tensor([draw(st.integers(0, k))]) if rows == 1 and draw(st.booleans()) else None
    return replace(given, biases=biases, residual=residual, count=count)


@settings(max_examples=examples(40))
@given(problems())
@pytest.mark.slow_in_triton
def test_any_size(target, problem):
    problem.check(target("low_bit_linear", *problem.arguments()))


def assert_near(result: torch.Tensor, exact: torch.Tensor, share: float = 3e-6) -> None:
    """Within what float32 loses beside the largest of the results."""
    assert ((result.double() - exact).abs() <= share * exact.abs().max()).all()


def listed(depth: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(depth, generator=seeded(2))[:k].sort().values
    return entries("normal", 1, k, seed=1), order.int()[None]


@pytest.mark.parametrize("form", [Int6(64), Int5(32)], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
def test_codes_that_fill_no_bytes(target, form, sparse):
    """Triton's kernels read them; those in CUDA C++ say that they do not."""
    given = drawn(form, [64, 50, 33], 300, *(listed(300, 170) if sparse else (entries("normal", 2, 300, seed=1), None)))
    if target.kernels is cuda_kernels:
        with pytest.raises(
            LarosaError, match=f"kernels read weights of int8 and int4, not of {form.name}: set LAROSA_"
        ):
            target("low_bit_linear", *given.arguments())
    else:
        given.check(target("low_bit_linear", *given.arguments()))


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.slow_in_triton
def test_long_lists(target, form):
    """Longer than what a block holds of them at a time."""
    given = drawn(form, [2300], 2400, *listed(2400, 2300))
    given.check(target("low_bit_linear", *given.arguments()))


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize("stored", ["int8", torch.bfloat16])
def test_an_adapter_comes_along(target, form, stored):
    residual = entries("normal", 1, 90, seed=3)
    given = drawn(form, [512], 70, *listed(70, 35))
    if stored == "int8":
        given = replace(given, adapter=digits(512, 106, 4), adapter_scale=entries("normal", 512, seed=5))
    else:
        given = replace(given, adapter=column_major(entries("normal", 512, 90, seed=4).to(stored)))
    result = target("low_bit_linear", *replace(given, residual=residual).arguments())
    exact = low_bit_linear_reference(*replace(given, residual=residual).each(torch.Tensor.double).arguments())
    assert_near(result, exact)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_columns_that_are_not_read_do_not_show(target, form):
    given = drawn(form, [256], 70, *listed(70, 35))
    before = target("low_bit_linear", *given.arguments())
    others = torch.ones(70, dtype=torch.bool)
    others[given.indices[0].long()] = False
    given.scales[0][others] = torch.nan
    given.codes[0][others] = 0x77
    assert torch.equal(target("low_bit_linear", *given.arguments()), before)
    # Nor do those behind the entries that somebody counted.
    given.scales[0][given.indices[0, 20:].long()] = torch.nan
    counted = replace(given, count=torch.tensor([20]))
    counted.check(target("low_bit_linear", *counted.arguments()))


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(target, form, bad):
    """Also where a code is 0, as the product of floats has it; NaN of one group only in that."""
    values, indices = listed(70, 35)
    values[0, 17] = bad
    given = drawn(form, [256], 70, values, indices)
    given.codes[0][::2] = 0x88 if form.bits == 4 else 0
    assert not target("low_bit_linear", *given.arguments()).isfinite().any()
    given = drawn(form, [256], 70, *listed(70, 35))
    given.scales[0][given.indices[0, 3].long(), 1] = bad
    finite = target("low_bit_linear", *given.arguments())[0].isfinite()
    assert finite.nonzero()[:, 0].tolist() == [n for n in range(256) if n // form.group != 1]


SITES = {
    "norm": {"eps": 1e-5},
    "norm, gate and up": {"eps": 1e-5, "swiglu": True},
    "counts": {"k": 300},
    "counts of a norm, gate and up": {"eps": 1e-5, "k": 300, "swiglu": True},
    "thresholds": {"threshold": 0.5},
    "thresholds of a norm": {"eps": 1e-5, "threshold": 0.5},
    "nothing kept": {"k": 0},
    "everything": {},
}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_sites(target, form, name):
    options: dict[str, Any] = {"eps": None, "k": None, "threshold": None, "swiglu": False, **SITES[name]}
    x, gain = entries("normal", 1, 600, seed=1), entries("normal", 600, seed=2).half()
    given = drawn(form, [256] * 2 if options["swiglu"] else [512], 600, x, None)
    score = torch.rand(600, generator=seeded(3))
    residual = None if options["swiglu"] else entries("normal", 1, 512, seed=4)
    kept = options["k"], options["threshold"], options["swiglu"]
    result = target("low_bit_site", x, gain, options["eps"], score, *kept, *given.weights, residual)
    exact = low_bit_site_reference(
        *(x.double(), gain.double(), options["eps"], score.double(), *kept, *given.weights, doubled(residual))
    )
    assert_near(result, exact)


@pytest.mark.parametrize("stored", ["int8", torch.float32])
@pytest.mark.parametrize("kept", [(None, 0.5), (200, None), (None, None)], ids=["threshold", "counts", "everything"])
def test_sites_with_an_adapter(target, kept, stored):
    x, residual = entries("normal", 1, 600, seed=1), entries("normal", 1, 90, seed=2)
    given = drawn(FORMS[0], [512], 600, x, None)
    adapter, scale = digits(512, 106, 4), entries("normal", 512, seed=5)
    if stored != "int8":
        adapter, scale = column_major(entries("normal", 512, 90, seed=4)), None
    result = target("low_bit_site", x, *[None] * 3, *kept, False, *given.weights, residual, adapter, scale)
    exact = low_bit_site_reference(
        *(x.double(), *[None] * 3, *kept, False, *given.weights, residual.double(), adapter, doubled(scale))
    )
    assert_near(result, exact)


def usual(**changed: Any) -> tuple[Any, ...]:
    """Arguments of a product of 40 outputs."""
    given = {
        **{"values": torch.zeros(1, 5), "indices": None, "codes": [torch.zeros(5, 20, dtype=torch.uint8)]},
        **{"scales": [torch.zeros(5, 2).bfloat16()], "outputs": [40], "group": 32},
        **{"form": "int4", "biases": [None]},
    }
    return tuple((given | changed).values())


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"group": 48}, "group must be one of 32, 64, 128, not 48"),
        ({"codes": [torch.zeros(5, 20)]}, "codes of int4 must be uint8"),
        ({"codes": [torch.zeros(5, 19, dtype=torch.uint8)]}, r"codes must be \[5, 20\]"),
        ({"codes": [torch.zeros(20, 5, dtype=torch.uint8).t()]}, "each column in one piece"),
        ({"scales": [torch.zeros(5, 2)]}, "scales must be bfloat16"),
        ({"scales": [torch.zeros(5, 1).bfloat16()]}, r"scales must be \[5, 2\]"),
        ({"values": torch.zeros(1, 4)}, r"without indices values must be \[B, 5\]"),
        ({"biases": []}, "1 codes with 1 scales, 1 outputs and 0 biases"),
    ],
)
def test_what_cannot_be_multiplied(target, changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        target("low_bit_linear", *usual(**changed))
