"""The keys and values of a text of limited length, allocated once."""

from __future__ import annotations

from typing import Any

import torch

from larosa.architectures import Heads
from larosa.errors import LarosaError
from larosa.memory import available_memory


class KeyValueCache:
    """Room for the keys and values of `length` positions: for each layer two tensors [K, length, d].

    Memory is checked before it is taken. The entries are undefined until they are written; attention
    reads none after the current position.

    Raises:
        LarosaError: there is less memory than the cache needs.
    """

    def __init__(self, config: Any, length: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = Heads.of(config)
        shape = (config.num_hidden_layers, heads.keys, length, heads.size)
        needed = 2 * torch.Size(shape).numel() * dtype.itemsize
        free = available_memory(device)
        if needed > free:
            raise LarosaError(
                f"a cache of {length} tokens needs {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free: "
                "ask for fewer tokens"
            )
        self.length = length
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device).unbind() for _ in range(2))
        self.scales = None
        if dtype == torch.int8:
            self.scales = torch.empty(*shape[:3], 2, device=device).unbind()

    def fill(self, past: Any) -> None:
        """Copy the first positions from a transformers cache that holds all of them, of batch size 1."""
        for index, (keys, values, layer) in enumerate(zip(self.keys, self.values, past.layers, strict=True)):
            positions = layer.keys.shape[-2]
            for i, (cache, filled) in enumerate(((keys, layer.keys[0]), (values, layer.values[0]))):
                if self.scales is None:
                    cache[:, :positions] = filled
                    continue
                scale = filled.float().abs().amax(dim=-1) / 127
                self.scales[index][:, :positions, i] = scale
                inverse = torch.where(scale > 1e-37, 1 / scale, 0.0)
                cache[:, :positions] = (filled.float() * inverse[..., None]).nan_to_num(0.0).round().clamp(-127, 127)
