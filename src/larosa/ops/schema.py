"""The operators of a decoding step as PyTorch sees them: one schema each, one kernel a device.

A kernel takes part by `implement("name", "CPU")`; the operator is then `torch.ops.larosa.name`. Activations are
float32 on every device, whatever the weights are, so that a step rounds nowhere but in its sums. There is
no default implementation: a device without kernels is an error, never a quiet detour. Nor are tensors of several
devices taken, which PyTorch hands to the kernel of one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from larosa.ops import checks

_LIBRARY = torch.library.Library("larosa", "DEF")
_devices: set[str] = set()
_Function = TypeVar("_Function", bound=Callable[..., object])


def define(schema: str) -> Callable[[_Function], _Function]:
    """Declare an operator; the decorated function gives shapes and dtypes of its results ("fake")."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]

    def register(fake: _Function) -> _Function:
        torch.library.register_fake(f"larosa::{name}", _on_one_device(name, fake), lib=_LIBRARY)
        return fake

    return register


def implement(name: str, device: str) -> Callable[[_Function], _Function]:
    """Make the decorated function the kernel of an operator on a device, "CPU" or "CUDA"."""

    def register(kernel: _Function) -> _Function:
        _LIBRARY.impl(name, _on_one_device(name, kernel), device)
        _devices.add(device.lower())
        return kernel

    return register


def _on_one_device(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function, once its tensors are known to be on one device."""
    operator: Any = getattr(torch.ops.larosa, name).default
    names = tuple(argument.name for argument in operator._schema.arguments)

    @functools.wraps(function)
    def checked(*arguments: Any) -> object:
        checks.one_device(name, names, arguments)
        return function(*arguments)

    return checked


def has_kernels(device: str) -> bool:
    """Whether operators have kernels on a type of device, "cpu" or "cuda"."""
    return device in _devices
