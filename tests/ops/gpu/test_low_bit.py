"""Products with codes of 8 and 4 bits against float64, on every layout that they may have."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.formats import GROUPS, ColumnFormat, Int4, Int8
from larosa.ops.low_bit import low_bit_linear_reference
from tests.examples import examples

from .cases import DTYPES, doubled, entries, seeded
from .test_products import EPS, OUTPUTS

#: Codes of 4 bits are added up as 16 to 31, for 24 to be taken off: so much larger is a term than by the highest code.
LARGER = 31 / 7


@dataclass(frozen=True)
class Given:
    """What `low_bit_linear` is given; codes and scales lie `beside` others in memory."""

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

    @classmethod
    def drawn(cls, form: ColumnFormat, outputs: list[int], depth: int, values, indices, seed: int, beside: int = 0):
        codes, scales = [], []
        for i, size in enumerate(outputs):
            q = torch.randint(form.lowest, form.highest + 1, (depth, size), generator=seeded(seed + i))
            codes.append(in_more(form.pack(q), beside))
            scales.append(in_more(entries("normal", depth, form.groups(size), seed=seed + i).bfloat16(), beside % 7))
        return cls(form, values, indices, codes, scales, outputs, [None] * len(outputs))

    def arguments(self):
        return (
            *(self.values, self.indices, self.codes, self.scales, self.outputs, self.form.group, self.biases),
            *(self.residual, self.count, self.adapter, self.adapter_scale),
        )

    def check(self, result: torch.Tensor) -> None:
        """Within the bound that holds for any order of summation."""
        exact = replace(self.each(doubled), values=self.values.double())
        bound = self.each(lambda x: None if x is None else x.double().abs())
        absolute = [
            self.form.pack(self.form.unpack(c, n).abs().clamp(max=self.form.highest))
            for c, n in zip(self.codes, self.outputs, strict=True)
        ]
        # The lowest code of 4 bits has no magnitude of its own: it is one more than the highest.
        more = 1.0 if isinstance(self.form, Int8) else LARGER * 8 / 7
        bound = replace(
            bound, values=more * self.values.double().abs(), codes=absolute, scales=[s.abs() for s in self.scales]
        )
        terms = self.values.shape[1] + (0 if self.adapter is None else self.adapter.shape[1])
        if self.form.bits == 4:  # codes of 0 have terms as well
            bound = replace(
                bound,
                codes=[
                    self.form.pack(torch.full((len(c), n), 7)) for c, n in zip(self.codes, self.outputs, strict=True)
                ],
            )
        assert result.dtype == torch.float32
        error = (result.double() - low_bit_linear_reference(*exact.arguments())).abs()
        assert (error <= (terms + 8) * EPS * low_bit_linear_reference(*bound.arguments()) + 1e-44).all()

    def each(self, change):
        """With floats but scales changed."""
        return replace(
            self,
            biases=list(map(change, self.biases)),
            residual=change(self.residual),
            adapter_scale=change(self.adapter_scale),
        )


def in_more(x: torch.Tensor, beside: int) -> torch.Tensor:
    """The same columns, `beside` elements into larger ones, in memory that is poisoned elsewhere."""
    poison = torch.nan if x.is_floating_point() else 0x5A
    whole = torch.full((len(x), x.shape[1] + 2 * beside), poison, dtype=x.dtype)
    whole[:, beside : beside + x.shape[1]] = x
    return whole[:, beside : beside + x.shape[1]]


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**31))
    form = draw(st.sampled_from([Int8, Int4]))(draw(st.sampled_from(GROUPS)))
    rows, depth = draw(st.integers(0, 2)), draw(st.integers(1, 300))
    outputs = draw(OUTPUTS | st.lists(st.integers(1, 8).map(lambda n: 32 * n), min_size=1, max_size=4))
    k = draw(st.integers(0, depth) | st.just(depth))
    values = entries(draw(st.sampled_from(["normal", "tied", "zero", "huge"])), rows, k, seed=seed)
    order = torch.rand(rows, depth, generator=seeded(seed)).argsort(1)[:, :k]
    indices = None if k == depth and draw(st.booleans()) else order.sort(1).values.int()
    given = Given.drawn(form, outputs, depth, values, indices, seed, draw(st.sampled_from([0, 0, 1, 16])))
    biases = [entries("normal", n, seed=seed).to(draw(st.sampled_from(DTYPES))) for n in outputs]
    biases = [bias if draw(st.booleans()) else None for bias in biases]
    residual = entries("normal", rows, sum(outputs), seed=seed) if draw(st.booleans()) else None
    count = torch.tensor([draw(st.integers(0, k))]) if rows == 1 and draw(st.booleans()) else None
    return replace(given, biases=biases, residual=residual, count=count)


@settings(max_examples=examples(40))
@given(problems())
def test_any_size(target, problem):
    problem.check(target("low_bit_linear", *problem.arguments()))
