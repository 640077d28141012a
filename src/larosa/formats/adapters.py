"""Adapters of the residual stream: in the model's own dtype, or by 8-bit numbers (paper, section 4.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import torch

#: How much more an entry's high digit counts than its low one.
HIGH = 128.0

_LARGEST = 127  # of a digit
_LEADING_STEP = 16


def leading_entries(width: int) -> int:
    """How many of a stream's first entries, which hold most of its length, have two digits: about a sixteenth."""
    return min(width, _LEADING_STEP * -(-width // (16 * _LEADING_STEP)))


@dataclass(frozen=True)
class Adapter:
    """x <- x R of a stream of D entries, as it is stored: `weight` [D, columns] has a row for each output.

    `scale` [D] is in the model's dtype; None where the format has none.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None


class AdapterStorage(ABC):
    """How adapters are stored."""

    @abstractmethod
    def columns(self, width: int) -> int:
        """How many numbers an output of a stream of so many entries has."""

    @abstractmethod
    def stored_bytes(self, width: int, element_size: int) -> int:
        """Of an adapter of a model whose weights have elements of so many bytes."""

    @abstractmethod
    def parts(self, inputs: slice, width: int) -> list[slice]:
        """Which columns belong to these entries of the stream, in their order."""

    @abstractmethod
    def pack(self, R: torch.Tensor, dtype: torch.dtype) -> Adapter:
        """R [D, D] float64, rounded once, for a model of this dtype."""

    @abstractmethod
    def unpack(self, adapter: Adapter) -> torch.Tensor:
        """R as it is stored, [D, D] float64."""


class FullAdapters(AdapterStorage):
    """R^T [D, D] in the model's dtype."""

    def columns(self, width: int) -> int:
        """One for each entry."""
        return width

    def stored_bytes(self, width: int, element_size: int) -> int:
        """Of R^T."""
        return width * width * element_size

    def parts(self, inputs: slice, width: int) -> list[slice]:
        """The same."""
        return [inputs]

    def pack(self, R: torch.Tensor, dtype: torch.dtype) -> Adapter:
        """R^T in this dtype."""
        return Adapter(R.T.to(dtype))

    def unpack(self, adapter: Adapter) -> torch.Tensor:
        """The same, transposed back."""
        return adapter.weight.T.double()


class Int8Adapters(AdapterStorage):
    """A digit of 8 bits for each entry, then high digits for the `leading_entries`, and a scale for each output.

    A high digit counts `HIGH` times. Scales are powers of two, and so the same in every dtype.
    """

    def columns(self, width: int) -> int:
        """Digits of both kinds."""
        return width + leading_entries(width)

    def stored_bytes(self, width: int, element_size: int) -> int:
        """Digits, and scales in the model's dtype."""
        return width * (self.columns(width) + element_size)

    def parts(self, inputs: slice, width: int) -> list[slice]:
        """Low digits, then high ones, of which there may be none."""
        leading = leading_entries(width)
        return [inputs, slice(width + min(inputs.start, leading), width + min(inputs.stop, leading))]

    def empty(self, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Digits and scales of an adapter, for the caller or a checkpoint to fill."""
        digits = torch.empty(width, self.columns(width), dtype=torch.int8, device=device)
        return digits, torch.empty(width, dtype=dtype, device=device)

    def pack(self, R: torch.Tensor, dtype: torch.dtype) -> Adapter:
        """With the smallest scales that no digit is too large for."""
        wanted, leading = R.T, leading_entries(len(R))
        reach = torch.full((len(R),), float(_LARGEST)).to(R)
        reach[:leading] *= HIGH
        needed = (wanted.abs() / reach).amax(1).clamp_min(torch.finfo(torch.float16).smallest_normal)
        scale = needed.log2().ceil().exp2()
        steps = wanted / scale[:, None]
        high = (steps[:, :leading] / HIGH).round()
        steps[:, :leading] -= HIGH * high
        digits = torch.cat([steps.round(), high], dim=1).clamp(-_LARGEST, _LARGEST)
        return Adapter(digits.to(torch.int8), scale.to(dtype))

    def unpack(self, adapter: Adapter) -> torch.Tensor:
        """Every digit times what it counts."""
        assert adapter.scale is not None, "8-bit numbers have a scale"
        width = len(adapter.weight)
        factors = self.factors(adapter.weight, adapter.scale, width, torch.float64)
        matrix, high = factors[:, :width], factors[:, width:]
        matrix[:, : high.shape[1]] += high
        return matrix.T

    def factors(self, weight: torch.Tensor, scale: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """What digits [N, D + leading] multiply [x, x_leading] by, for x of D = `width` entries, in a float dtype."""
        factors = weight.to(dtype) * scale.to(dtype)[:, None]
        factors[:, width:] *= HIGH
        return factors


INT8_ADAPTERS = Int8Adapters()


class AdapterFormat(StrEnum):
    """What adapters are stored as: the model's own dtype (`full`), or 8 bits and a scale an output (`int8`)."""

    FULL = "full"
    INT8 = "int8"

    @classmethod
    def usual(cls, dtype: torch.dtype) -> AdapterFormat:
        """Of a model where nobody says: 8 bits where weights are rounded to 16 themselves."""
        return cls.INT8 if dtype.itemsize == 2 else cls.FULL

    @property
    def storage(self) -> AdapterStorage:
        """How that is."""
        return _STORAGE[self]


_STORAGE: dict[AdapterFormat, AdapterStorage] = {
    AdapterFormat.FULL: FullAdapters(),
    AdapterFormat.INT8: INT8_ADAPTERS,
}
