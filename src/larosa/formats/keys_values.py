"""Keys and values of attention: in the model's own dtype, or by 8-bit numbers, a scale a vector."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from larosa.errors import choose

_SCALE_DTYPE = torch.bfloat16
_LARGEST = 127


def round_vectors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values rounded to 8 bits.

    Args:
        x: [..., d] of any float dtype.

    Returns:
        [..., d] int8, and [...] bfloat16 by which to multiply them: a 127th of the largest magnitude. A vector with an
        entry that is not finite has digits of 0 and a scale that is not finite; one next to nothing has digits of 0.
    """
    scale = (x.abs().amax(dim=-1) / _LARGEST).to(_SCALE_DTYPE)
    wide = scale.to(x.dtype)
    inverse = torch.where(wide > 1e-37, wide.reciprocal(), 0.0)
    rounded = (x * inverse[..., None]).nan_to_num(0.0).round().clamp(-_LARGEST, _LARGEST)
    return rounded.to(torch.int8), scale


@dataclass(frozen=True)
class CacheFormat:
    """Keys and values as they are, in this dtype."""

    dtype: torch.dtype

    def vector_bytes(self, size: int) -> int:
        """Of one position's key, or value, of a head of so many entries."""
        return size * self.dtype.itemsize

    def empty(
        self, shape: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values [..., d], and scales [..., 2] where the format has them, for the caller to fill."""
        keys, values = (torch.empty(shape, dtype=self.dtype, device=device) for _ in range(2))
        return keys, values, None

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors [..., d] of any float dtype as they are stored, and scales [...]."""
        return x.to(self.dtype), None

    def unpack(self, stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """What they stand for, in a float dtype."""
        return stored.to(dtype)


class Int8Cache(CacheFormat):
    """`round_vectors` of keys and of values."""

    def __init__(self) -> None:
        super().__init__(torch.int8)

    def vector_bytes(self, size: int) -> int:
        """With its scale."""
        return super().vector_bytes(size) + _SCALE_DTYPE.itemsize

    def empty(
        self, shape: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scales are of keys (first) and of values (second)."""
        keys, values, _ = super().empty(shape, device)
        return keys, values, torch.empty(*shape[:-1], 2, dtype=_SCALE_DTYPE, device=device)

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rounded in float32."""
        return round_vectors(x.float())

    def unpack(self, stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Codes times their scale."""
        assert scale is not None, "8-bit numbers have a scale"
        return stored.to(dtype) * scale[..., None].to(dtype)


class CacheDtype(StrEnum):
    """How an engine keeps keys and values."""

    AUTO = "auto"  # as the model's weights
    INT8 = "int8"  # 8 bits, and a scale for each position's key and value

    @classmethod
    def parse(cls, name: str) -> CacheDtype:
        """The one of that name.

        Raises:
            LarosaError: there is none.
        """
        return choose(cls, name, "kv_cache_dtype")

    def beside(self, weights: torch.dtype) -> CacheFormat:
        """What that is beside weights of a dtype."""
        return Int8Cache() if self is CacheDtype.INT8 else CacheFormat(weights)
