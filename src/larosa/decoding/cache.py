"""The keys and values of texts of limited length, allocated once."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from transformers import DynamicCache

from larosa.architectures import Heads
from larosa.errors import LarosaError, choose
from larosa.ops.attend import digits
from larosa.utils.memory import available_memory

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
        return choose(cls, name, "kv_cache_dtype")

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


#: Keys and values of a layer, and what int8 ones are multiplied by.
Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class KeyValueCache:
    """Room for the keys and values of `length` positions of each of some texts.

    For each layer these are two tensors [texts, K, length, d]; int8 ones are to be multiplied by their position's
    scales, [texts, K, length, 2] bfloat16.

    Memory is checked before it is taken. The entries are undefined until they are written; attention
    reads none after the current position.

    Raises:
        LarosaError: there is less memory than the cache needs.
    """

    def __init__(self, config: Any, length: int, dtype: torch.dtype, device: torch.device, texts: int = 1) -> None:
        heads = Heads.of(config)
        shape = (config.num_hidden_layers, texts, heads.keys, length, heads.size)
        needed = texts * cache_bytes(config, dtype, length)
        free = available_memory(device)
        if needed > free:
            raise LarosaError(
                f"a cache of {length} tokens{f' for each of {texts} texts' if texts > 1 else ''} needs "
                f"{needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free: ask for fewer tokens"
            )
        self.length = length
        keys, values = (torch.empty(shape, dtype=dtype, device=device).unbind() for _ in range(2))
        scales: tuple[torch.Tensor | None, ...] = (None,) * len(keys)
        if dtype == torch.int8:
            scales = torch.empty(*shape[:-1], 2, dtype=_SCALE, device=device).unbind()
        #: Of all texts, layer by layer.
        self.layers: list[Entries] = list(zip(keys, values, scales, strict=True))

    def of(self, text: int) -> list[Entries]:
        """The entries of one text, layer by layer: [K, length, d]."""
        return [(keys[text], values[text], None if s is None else s[text]) for keys, values, s in self.layers]

    def fill(self, past: Any, start: int = 0, text: int = 0) -> None:
        """Copy the positions from `start` on from a transformers cache that holds all of them, of batch size 1."""
        for (keys, values, scales), layer in zip(self.of(text), past.layers, strict=True):
            positions = slice(start, layer.keys.shape[-2])
            new_keys, new_values = layer.keys[0, :, start:], layer.values[0, :, start:]
            if scales is None:
                keys[:, positions] = new_keys
                values[:, positions] = new_values
            else:
                keys[:, positions], scales[:, positions, 0] = digits(new_keys.float())
                values[:, positions], scales[:, positions, 1] = digits(new_values.float())

    def past(self, length: int, dtype: torch.dtype, text: int = 0) -> DynamicCache:
        """The first positions as a transformers cache of batch size 1, in a model's number format."""
        past = DynamicCache()
        for index, (keys, values, scales) in enumerate(self.of(text)):
            # Of length 0 it is to be empty: a model tells a prompt by that.
            if length:
                read = [entries[None, :, :length].to(dtype) for entries in (keys, values)]
                if scales is not None:
                    read = [entries * scales[None, :, :length, i, None].to(dtype) for i, entries in enumerate(read)]
                past.update(*read, index)
        return past

    def copy(self, other: KeyValueCache, length: int, source: int = 0, text: int = 0) -> None:
        """Take the first positions of a text of a cache of the same model and format."""
        for mine, theirs in zip(self.of(text), other.of(source), strict=True):
            for to, entries in zip(mine, theirs, strict=True):
                if to is not None and entries is not None:
                    to[:, :length] = entries[:, :length]
