"""The runtime is held to the same texts as the engine: those on which no choice of entries is close."""

from ..decoding.conftest import clear_ids, margin

__all__ = ["clear_ids", "margin"]
