"""Older checkpoints brought to the format of now, from each version to the next: settings, and weights beside them.

Version 1: attention and MLP write into the basis before an adapter, which multiplies their outputs too.
Version 2: they write into the basis behind it, and the adapter multiplies the residual stream alone. Keys that came
later have defaults which say what was the case without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from larosa.errors import LarosaError

if TYPE_CHECKING:
    from larosa.architectures import Architecture

_loading: ContextVar[bool] = ContextVar("loading", default=False)


class _Step(NamedTuple):
    """From one version to the next."""

    #: Of the `larosa` block, whose version is counted up by itself.
    settings: Callable[[dict[str, Any]], dict[str, Any]]
    #: Whether the weights beside such a block have to be changed, and how they are, in place.
    has_weights: Callable[[dict[str, Any]], bool]
    weights: Callable[[Any, Architecture], None]


def migrate_settings(block: dict[str, Any]) -> dict[str, Any]:
    """A `larosa` block in the format of now; the block itself where it is.

    Raises:
        LarosaError: it is of a version that there never was, or of a newer one.
    """
    version = block.get("format_version", FORMAT_VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise LarosaError(f"config.json, key 'larosa.format_version': {version!r} is no version, which are 1, 2, ...")
    if version > FORMAT_VERSION:
        raise LarosaError(
            f"this checkpoint has format version {version}, this larosa reads {FORMAT_VERSION}: "
            "pip install --upgrade larosa"
        )
    for older in range(version, FORMAT_VERSION):
        block = {**_STEPS[older].settings(block), "format_version": older + 1}
    return block


@contextmanager
def loading_weights() -> Iterator[None]:
    """While a model is made here, `migrate_weights` will follow once it has its weights."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def check_weights_follow(block: dict[str, Any]) -> None:
    """Refuse to make a model that would be filled with weights of another meaning.

    Raises:
        LarosaError: the block is of an older version, whose weights nobody is going to change.
    """
    version = block.get("format_version", FORMAT_VERSION)
    if not _loading.get() and any(_STEPS[older].has_weights(block) for older in range(version, FORMAT_VERSION)):
        raise LarosaError(
            f"this checkpoint has format version {version}: load it by larosa.load or from_pretrained, "
            f"which bring its weights to version {FORMAT_VERSION}"
        )


@torch.no_grad()
def migrate_weights(model: Any, architecture: Architecture) -> None:
    """Bring a model as it was loaded to the format of now, its weights and the block in its configuration, in place.

    Raises:
        LarosaError: its weights are not in memory.
    """
    block = model.config.larosa
    for older in range(block.get("format_version", FORMAT_VERSION), FORMAT_VERSION):
        if _STEPS[older].has_weights(block):
            if any(weight.device.type == "meta" for weight in model.parameters()):
                raise LarosaError(
                    f"this checkpoint has format version {older}: load it without offloading, save it, and load that"
                )
            _STEPS[older].weights(model, architecture)
    model.config.larosa = migrate_settings(block)


def _write_behind_adapters(model: Any, architecture: Architecture) -> None:
    """1 to 2. A (x + W h + b) is A x + (A W) h + A b, computed in float64 and rounded once."""
    for layer in architecture.layers(model):
        for name, site in (("attention_adapter", "h2"), ("residual_adapter", "h4")):
            adapter = getattr(layer, name)
            if adapter is None:
                continue
            for linear in architecture.linears(layer, site):
                for parameter in (linear.weight, linear.bias):
                    if parameter is not None:
                        parameter.copy_(adapter.weight.double() @ parameter.double())


_STEPS = {
    1: _Step(
        settings=lambda block: block,
        has_weights=lambda block: block.get("rotation") in ("layer", "block"),
        weights=_write_behind_adapters,
    ),
}

#: Of the `larosa` block and of what the weights beside it mean.
FORMAT_VERSION = 1 + max(_STEPS)
