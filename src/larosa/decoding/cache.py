"""The keys and values of a text of limited length, allocated once."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from transformers import DynamicCache

from larosa.architectures import Heads
from larosa.errors import LarosaError
from larosa.memory import available_memory
from larosa.ops.attend import digits

_SCALE = torch.bfloat16


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
        try:
            return cls(name)
        except ValueError:
            raise LarosaError(f"unknown kv_cache_dtype '{name}': one of {', '.join(cls)}") from None

    def beside(self, weights: torch.dtype) -> torch.dtype:
        """What that is beside weights of a dtype."""
        return torch.int8 if self is CacheDtype.INT8 else weights


def cache_bytes(config: Any, dtype: torch.dtype, positions: int) -> int:
    """Keys and values of so many positions in every layer, with their scales; windows aside."""
    heads = Heads.of(config)
    vector = heads.size * dtype.itemsize + (_SCALE.itemsize if dtype == torch.int8 else 0)
    return int(2 * config.num_hidden_layers * heads.keys * vector * positions)


class RoundedCache(DynamicCache):
    """transformers' cache, for measuring what 8 bits lose: all that it gives back has been rounded to them."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `DynamicCache.update`."""
        return super().update(_rounded(keys), _rounded(values), *args, **kwargs)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    rounded, scale = digits(x.float())
    return (rounded * scale.float()[..., None]).to(x.dtype)


class KeyValueCache:
    """Room for the keys and values of `length` positions: for each layer two tensors [K, length, d].

    int8 ones are to be multiplied by their position's scales, for each layer [K, length, 2] bfloat16; others have None.

    Memory is checked before it is taken. The entries are undefined until they are written; attention
    reads none after the current position.

    Raises:
        LarosaError: there is less memory than the cache needs.
    """

    def __init__(self, config: Any, length: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = Heads.of(config)
        shape = (config.num_hidden_layers, heads.keys, length, heads.size)
        needed = cache_bytes(config, dtype, length)
        free = available_memory(device)
        if needed > free:
            raise LarosaError(
                f"a cache of {length} tokens needs {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free: "
                "ask for fewer tokens"
            )
        self.length = length
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device).unbind() for _ in range(2))
        self.scales: tuple[torch.Tensor | None, ...] = (None,) * len(self.keys)
        if dtype == torch.int8:
            self.scales = torch.empty(*shape[:3], 2, dtype=_SCALE, device=device).unbind()

    def fill(self, past: Any) -> None:
        """Copy the first positions from a transformers cache that holds all of them, of batch size 1."""
        for keys, values, scales, layer in zip(self.keys, self.values, self.scales, past.layers, strict=True):
            positions = slice(layer.keys.shape[-2])
            if scales is None:
                keys[:, positions] = layer.keys[0]
                values[:, positions] = layer.values[0]
            else:
                keys[:, positions], scales[:, positions, 0] = digits(layer.keys[0].float())
                values[:, positions], scales[:, positions, 1] = digits(layer.values[0].float())
