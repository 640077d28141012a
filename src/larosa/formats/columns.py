"""Weights of few bits, stored by input columns, in groups that lie inside one column (docs/low-bit.md).

A product that skips entries of its input skips their columns with all their scales, and in a column that it reads a
group's scale is multiplied with the activation once: y[n] += (x[d] * scales[d, n // group]) * q[n, d].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from larosa.errors import LarosaError

#: How many outputs share a scale, in one column.
GROUPS = (32, 64, 128)

#: Of scales. With the range of float32 it neither over- nor underflows, and what its 8 bits round a scale by costs
#: nothing, as whole numbers are chosen for the rounded scale. A scale times a whole number is exact in float32.
SCALE_DTYPE = torch.bfloat16

#: Weights dequantised at a time, for no matrix to need a whole float32 copy beside the one that is wanted: on a CPU so
#: many that what is made of them on the way stays in a core's cache, elsewhere so many that launches take no time.
_WEIGHTS, _WEIGHTS_ELSEWHERE = 1 << 19, 1 << 24

#: Neighbouring outputs whose codes stand together where a byte has no whole number of them.
_TOGETHER = 32
#: Hundredths of the ends of a range of 5 or 6 bits that scales are searched at.
_SHARES = range(92, 109, 2)


@dataclass(frozen=True)
class ColumnFormat(ABC):
    """How a linear W [N outputs, D inputs] is stored: W[n, d] = scales[d, n // group] * q[n, d].

    `codes` hold the whole numbers q of column d in row d, `scales` [D, ceil(N / group)] are bfloat16; the last group of
    a column may be short. Scales may be negative. With several `planes` W is a sum of as many such matrices, each of
    what those before it leave: column d of plane p is in row p D + d, and a product may read it or not.
    """

    group: int
    planes: int = 1
    name: ClassVar[str]
    bits: ClassVar[int]
    #: The range of q.
    lowest: ClassVar[int]
    highest: ClassVar[int]
    #: What a search of scales tries to map a group's largest magnitude to, sign included.
    targets: ClassVar[tuple[float, ...]]
    codes_dtype: ClassVar[torch.dtype]
    #: Outputs that share a scale where the user does not say.
    usual_group: ClassVar[int]

    def __post_init__(self) -> None:
        check_group(self.group)

    @classmethod
    @abstractmethod
    def codes_width(cls, outputs: int) -> int:
        """How many elements a column of so many outputs has in `codes`."""

    @abstractmethod
    def pack(self, q: torch.Tensor) -> torch.Tensor:
        """Codes [D, `codes_width`] of whole numbers q [D, N], of any dtype, `lowest` to `highest`."""

    @abstractmethod
    def unpack(self, codes: torch.Tensor, outputs: int) -> torch.Tensor:
        """q [D, N] int8 of codes [D, `codes_width`]."""

    def groups(self, outputs: int) -> int:
        """How many scales a column of so many outputs has."""
        return -(-outputs // self.group)

    def column_bytes(self, outputs: int) -> int:
        """Bytes of a column of so many outputs, codes and scales of all planes."""
        codes = self.codes_width(outputs) * self.codes_dtype.itemsize
        return self.planes * (codes + self.groups(outputs) * SCALE_DTYPE.itemsize)

    def empty(self, outputs: int, inputs: int, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a linear of these sizes, for the caller or a checkpoint to fill."""
        columns = self.planes * inputs
        codes = torch.empty(columns, self.codes_width(outputs), dtype=self.codes_dtype, device=device)
        return codes, torch.empty(columns, self.groups(outputs), dtype=SCALE_DTYPE, device=device)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, outputs: int, dtype: torch.dtype) -> torch.Tensor:
        """The linear's transpose W^T [D, N]: exact in float32 and float64, in 16 bits rounded once.

        Of several planes it is that of each, [planes D, N], and any columns of it may be asked for.
        """
        # bfloat16 numbers are multiplied exactly before they are rounded, anyway.
        exact = torch.float32 if dtype is torch.float16 else dtype
        weight = torch.empty(len(codes), outputs, dtype=dtype, device=codes.device)
        columns = max(1, (_WEIGHTS if codes.is_cpu else _WEIGHTS_ELSEWHERE) // outputs)
        for at in range(0, len(codes), columns):
            rows = slice(at, at + columns)
            wide = scales[rows, :, None].to(exact).expand(-1, -1, self.group).flatten(1)[:, :outputs]
            weight[rows] = self.unpack(codes[rows], outputs).to(exact) * wide
        return weight


class Int8(ColumnFormat):
    """A byte for each weight, two's complement; -128 is not used."""

    name = "int8"
    bits = 8
    lowest, highest = -127, 127
    targets: ClassVar[tuple[float, ...]] = (127.0,)
    codes_dtype = torch.int8
    usual_group = 128

    @classmethod
    def codes_width(cls, outputs: int) -> int:
        """As many."""
        return outputs

    def pack(self, q: torch.Tensor) -> torch.Tensor:
        """The same as int8."""
        return q.to(torch.int8)

    def unpack(self, codes: torch.Tensor, outputs: int) -> torch.Tensor:
        """The same."""
        return codes


class Int4(ColumnFormat):
    """Two weights a byte, each as q + 8: output 2b in the low four bits of byte b, 2b + 1 in the high ones.

    Behind an odd number of outputs the last four bits hold 8, which is 0.
    """

    name = "int4"
    bits = 4
    lowest, highest = -8, 7
    # The lowest is one farther from 0 than the highest, and cutting the largest off serves the others.
    targets = tuple(-(70 + 2 * step) / 10 for step in range(13)) + tuple((60 + 2 * step) / 10 for step in range(13))
    codes_dtype = torch.uint8
    usual_group = 32

    @classmethod
    def codes_width(cls, outputs: int) -> int:
        """Half as many, rounded up."""
        return -(-outputs // 2)

    def pack(self, q: torch.Tensor) -> torch.Tensor:
        """Two whole numbers a byte."""
        width = 2 * self.codes_width(q.shape[1])
        digits = torch.full((len(q), width), -self.lowest, dtype=torch.uint8, device=q.device)
        digits[:, : q.shape[1]] = (q - self.lowest).to(torch.uint8)
        return digits[:, ::2] | digits[:, 1::2] << 4

    def unpack(self, codes: torch.Tensor, outputs: int) -> torch.Tensor:
        """Two whole numbers of each byte."""
        digits = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :outputs]
        return digits.to(torch.int8) + self.lowest


def _around(lowest: int, highest: int) -> tuple[float, ...]:
    """What a search of scales tries in a range of 5 or 6 bits: places around both of its ends."""
    return tuple(end * share / 100 for end in (lowest, highest) for share in _SHARES)


class LeadingBits(ColumnFormat):
    """Four bits a weight as `Int4` has them, and the leading ones of 32 neighbouring outputs behind those.

    Of each 32 outputs of a column, the last of them filled with zeros, there are 16 bytes with the low four bits of
    q - `lowest`, two outputs each, and then n = 4 (`bits` - 4) bytes with the leading ones: those of the outputs in
    byte b of the 16 are in byte b % n, at place b // n from the lowest, the first output's lower.
    """

    codes_dtype = torch.uint8

    @classmethod
    def codes_width(cls, outputs: int) -> int:
        """Of whole 32 outputs."""
        return 4 * cls.bits * -(-outputs // _TOGETHER)

    def pack(self, q: torch.Tensor) -> torch.Tensor:
        """Whole numbers by 32."""
        leading, pieces = self.bits - 4, -(-q.shape[1] // _TOGETHER)
        digits = torch.full((len(q), pieces * _TOGETHER), -self.lowest, dtype=torch.uint8, device=q.device)
        digits[:, : q.shape[1]] = (q - self.lowest).to(torch.uint8)
        even, odd = digits.unflatten(1, (pieces, _TOGETHER // 2, 2)).unbind(-1)
        low = even & 15 | (odd & 15) << 4
        high = (even >> 4 | odd >> 4 << leading).unflatten(-1, (4 // leading, 4 * leading))
        packed = (high << self._places(q.device)).sum(dim=-2, dtype=torch.uint8)
        return torch.cat([low, packed], dim=-1).flatten(1)

    def unpack(self, codes: torch.Tensor, outputs: int) -> torch.Tensor:
        """Whole numbers of 32 outputs each."""
        leading, size = self.bits - 4, 4 * self.bits
        pieces = codes.unflatten(1, (codes.shape[1] // size, size))
        low, packed = pieces.split([_TOGETHER // 2, 4 * leading], dim=-1)
        high = (packed[..., None, :] >> self._places(codes.device)).flatten(-2)
        mask = (1 << leading) - 1
        even, odd = low & 15 | (high & mask) << 4, low >> 4 | (high >> leading & mask) << 4
        digits = torch.stack([even, odd], dim=-1).flatten(1)[:, :outputs]
        return digits.to(torch.int8) + self.lowest

    def _places(self, device: torch.device) -> torch.Tensor:
        """Where the leading bits of one byte's two outputs begin in another, [4 / leading bits, 1]."""
        return torch.arange(0, 8, 2 * (self.bits - 4), dtype=torch.uint8, device=device)[:, None]


class Int6(LeadingBits):
    """Six bits a weight, 24 bytes for 32 of them."""

    name = "int6"
    bits = 6
    lowest, highest = -32, 31
    targets = _around(lowest, highest)
    usual_group = 64


class Int5(LeadingBits):
    """Five bits a weight, 20 bytes for 32 of them."""

    name = "int5"
    bits = 5
    lowest, highest = -16, 15
    targets = _around(lowest, highest)
    usual_group = 32


#: By their names, which is what operators are told of them; in the order in which messages list them.
FORMATS: dict[str, type[ColumnFormat]] = {form.name: form for form in (Int8, Int6, Int5, Int4)}


def check_group(group: int) -> int:
    """Return `group` if so many outputs can share a scale.

    Raises:
        LarosaError: they cannot.
    """
    if group not in GROUPS:
        raise LarosaError(f"a weight group of {group}: one of {', '.join(map(str, GROUPS))}")
    return group
