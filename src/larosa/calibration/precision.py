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

#: Weights that are wide at a time else.
_WIDENED = 2**26


@contextmanager
def float32_arithmetic(module: nn.Module, device: torch.device, steps: bool = False) -> Iterator[None]:
    """Let a model or a part of it compute in float32 for the time being, where it runs on a CPU in 16 bits.

    Weights stay as they are: each linear widens its own for as long as it runs, some outputs at a time. There are
    gradients of activations alone.

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
    x = x if selector is None else selector(x)
    bias = None if linear.bias is None else linear.bias.float()
    if wide is not None:
        return F.linear(x, wide, bias)
    product: torch.Tensor = _WideLinear.apply(x, linear.weight, bias)
    return product


class _WideLinear(torch.autograd.Function):
    """x W^T + b in float32, W of 16 bits: going back widens W anew, some rows at a time, which autograd would keep."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        pieces = _pieces(weight)
        biases = [None] * len(pieces) if bias is None else bias.split([len(rows) for rows in pieces])
        parts = [F.linear(x, rows.float(), of_rows) for rows, of_rows in zip(pieces, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        pieces = _pieces(weight)
        parts = gradient.split([len(rows) for rows in pieces], dim=-1)
        total = parts[0] @ pieces[0].float()
        for part, rows in zip(parts[1:], pieces[1:], strict=True):
            total += part @ rows.float()
        return total, None, None


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(_WIDENED // weight.shape[1], 1))
