"""What the tests of a GPU's kernels are given, and how their results are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.4028234663852886e38)


@dataclass(frozen=True)
class Target:
    """One set of kernels."""

    kernels: ModuleType
    device: torch.device
    truncates: bool = False  # rounds to bfloat16 towards zero, as Triton's interpreter does

    def __call__(self, name: str, *arguments: Any) -> Any:
        """The operator's result on the CPU; a tensor among the arguments that it writes to is updated."""
        moved = [self._move(argument) for argument in arguments]
        result = getattr(self.kernels, name)(*moved)
        for argument, there in zip(arguments, moved, strict=True):
            if isinstance(argument, torch.Tensor) and there is not argument:
                argument.copy_(there)
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

    def _move(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self._move(each) for each in argument]
        if not isinstance(argument, torch.Tensor) or argument.device == self.device:
            return argument
        # All of its memory, for a copy of the tensor alone would have another address and other strides.
        memory = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).to(self.device)
        return memory.as_strided(argument.size(), argument.stride(), argument.storage_offset())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entries(kind: str, *shape: int, seed: int) -> torch.Tensor:
    """Float32 of a kind: normal; tied (a few values); zero; special (some infinite, NaN, tiny or huge); or huge."""
    generator = seeded(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "tied":
        x = (2 * x).round()
    if kind == "zero":
        x = torch.zeros(shape)
    if kind == "huge":
        x *= 1e30
    if kind == "special":
        where = torch.rand(shape, generator=generator) < 0.05
        which = torch.randint(len(SPECIAL), shape, generator=generator)
        x = torch.where(where, torch.tensor(SPECIAL)[which], x)
    return x


def bits(x: torch.Tensor) -> torch.Tensor:
    """To compare bit by bit, but all NaN alike."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).contiguous().view(torch.int32)


def assert_replays_repeat(graph: Any, captured: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Replay a captured graph some times: each one has to give the expected bits anew."""
    for _ in range(20):
        graph.replay()
        for result, first in zip(captured, expected, strict=True):
            if result.is_floating_point():
                assert torch.equal(bits(result), bits(first))
            else:
                assert torch.equal(result, first)


def doubled(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()
