"""The keys and values of texts of limited length, allocated once."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from larosa.architectures import Heads
from larosa.errors import LarosaError
from larosa.formats import CacheFormat
from larosa.utils.memory import available_memory


def cache_bytes(config: Any, form: CacheFormat, positions: int) -> int:
    """Keys and values of so many positions in every layer, with their scales; windows aside."""
    heads = Heads.of(config)
    return int(2 * config.num_hidden_layers * heads.keys * form.vector_bytes(heads.size) * positions)


class RoundedCache(DynamicCache):
    """transformers' cache, for measuring what a format loses: all that it gives back has been rounded to that."""

    def __init__(self, form: CacheFormat) -> None:
        super().__init__()
        self._format = form

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `DynamicCache.update`."""
        return super().update(self._rounded(keys), self._rounded(values), *args, **kwargs)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return self._format.unpack(*self._format.pack(x), torch.float32).to(x.dtype)


#: Keys and values of a layer, and scales where their format has them.
Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class KeyValueCache:
    """Room for the keys and values of `length` positions of each of some texts.

    For each layer these are two tensors [texts, K, length, d] and, where their format has them, scales
    [texts, K, length, 2], as `torch.ops.larosa.attend` takes them.

    Memory is checked before it is taken. The entries are undefined until they are written; attention
    reads none after the current position.

    Raises:
        LarosaError: there is less memory than the cache needs.
    """

    def __init__(self, config: Any, length: int, form: CacheFormat, device: torch.device, texts: int = 1) -> None:
        heads = Heads.of(config)
        shape = (config.num_hidden_layers, texts, heads.keys, length, heads.size)
        needed = texts * cache_bytes(config, form, length)
        free = available_memory(device)
        if needed > free:
            raise LarosaError(
                f"a cache of {length} tokens{f' for each of {texts} texts' if texts > 1 else ''} needs "
                f"{needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free: ask for fewer tokens"
            )
        self.length = length
        self._format = form
        keys, values, scales = form.empty(shape, device)
        of_layers = [None] * len(keys) if scales is None else scales.unbind()
        #: Of all texts, layer by layer.
        self.layers: list[Entries] = list(zip(keys.unbind(), values.unbind(), of_layers, strict=True))

    def of(self, text: int) -> list[Entries]:
        """The entries of one text, layer by layer: [K, length, d]."""
        return [(keys[text], values[text], None if s is None else s[text]) for keys, values, s in self.layers]

    def fill(self, past: Any, start: int = 0, text: int = 0) -> None:
        """Copy the positions from `start` on from a transformers cache that holds all of them, of batch size 1."""
        for (keys, values, scales), layer in zip(self.of(text), past.layers, strict=True):
            positions = slice(start, layer.keys.shape[-2])
            for which, (entries, new) in enumerate(((keys, layer.keys), (values, layer.values))):
                entries[:, positions], scale = self._format.pack(new[0, :, start:])
                if scales is not None and scale is not None:
                    scales[:, positions, which] = scale

    def past(self, length: int, dtype: torch.dtype, text: int = 0) -> DynamicCache:
        """The first positions as a transformers cache of batch size 1, in a model's number format."""
        past = DynamicCache()
        for index, (keys, values, scales) in enumerate(self.of(text)):
            # Of length 0 it is to be empty: a model tells a prompt by that.
            if length:
                kept = None if scales is None else scales[None, :, :length]
                read = [
                    self._format.unpack(entries[None, :, :length], None if kept is None else kept[..., which], dtype)
                    for which, entries in enumerate((keys, values))
                ]
                past.update(*read, index)
        return past

    def copy(self, other: KeyValueCache, length: int, source: int = 0, text: int = 0) -> None:
        """Take the first positions of a text of a cache of the same model and format."""
        for mine, theirs in zip(self.of(text), other.of(source), strict=True):
            for to, entries in zip(mine, theirs, strict=True):
                if to is not None and entries is not None:
                    to[:, :length] = entries[:, :length]
