"""float32 arithmetic with weights of 16 bits: on a CPU several times as fast, and nearer to what the engine does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

#: Bytes of widened weights that may be kept, where the same are used step after step and that is half of them.
_KEPT = 2**29


@contextmanager
def float32_arithmetic(module: nn.Module, device: torch.device, steps: bool = False) -> Iterator[None]:
    """Let a model or a part of it compute in float32 for the time being, where it runs on a CPU in 16 bits.

    Weights stay as they are: each linear widens its own for as long as it runs, so that only one is held twice.

    Args:
        module: whose linears and embedding of 16 bits are meant; with others, or off the CPU, nothing changes.
        device: where it runs.
        steps: it takes many steps of few tokens, of which widening is a good part: a small model's weights stay wide,
            as many as there is room for.
    """
    changed: list[nn.Module] = []
    hooks = []
    narrow = [part for part in module.modules() if _is_narrow(part)] if device.type == "cpu" else []
    room = _KEPT if steps and sum(4 * _numel(part) for part in narrow) <= 2 * _KEPT else 0
    try:
        for part in narrow:
            weight: Any = part.weight
            # A forward of its own (someone's wrapper, or this one further out) stays.
            if (isinstance(part, nn.Linear) or _selector(part) is not None) and "forward" not in vars(part):
                wide = weight.float() if 4 * weight.numel() <= room else None
                room -= 0 if wide is None else 4 * wide.numel()
                part.forward = partial(_wide_linear, part, wide)
                changed.append(part)
            elif isinstance(part, nn.Embedding):
                hooks.append(part.register_forward_hook(lambda _module, _inputs, output: output.float()))
        yield
    finally:
        for linear in changed:
            del linear.forward  # the instance's; the class has its own
        for hook in hooks:
            hook.remove()


def _is_narrow(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype in (torch.bfloat16, torch.float16)


def _numel(part: Any) -> int:
    return 0 if isinstance(part, nn.Embedding) else int(part.weight.numel())


def _selector(part: nn.Module) -> nn.Module | None:
    """That of a `SparseLinear`, which is no `nn.Linear` and has a weight; others have none."""
    return getattr(part, "selector", None)


def _wide_linear(linear: Any, wide: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    selector = _selector(linear)
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(x if selector is None else selector(x), linear.weight.float() if wide is None else wide, bias)
