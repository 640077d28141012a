"""Whether a model in memory is the plain one that its configuration describes.

Conversion replaces classes and weights, and the engine reads weights past the modules: whatever else somebody has put
into a model would be dropped without a word.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from larosa.architectures import find_architecture
from larosa.errors import LarosaError
from larosa.models import family_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_plain(model: Any) -> None:
    """Refuse a model that is more than its class makes of its configuration: by module, shape, hook or storage.

    Raises:
        LarosaError: the message names what it is and where, and the mend.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if hasattr(model, "merge_and_unload"):
        raise LarosaError("a model of peft: merge its adapters first, model = model.merge_and_unload()")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise LarosaError("a compiled model: give the one that torch.compile was called with")
    if not isinstance(model_type, str):
        raise LarosaError(f"a {type(model).__name__}: give a transformers causal language model")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LarosaError("the model has a LoRA adapter: merge it first (peft: merge_and_unload), or delete_adapter")
    _check_modules(model, model_type)
    _check_storage(model)


def _check_modules(model: Any, model_type: str) -> None:
    kind: Any = type(model)
    architecture = find_architecture(model_type)
    allowed = (architecture.causal_lm_class, family_of(architecture).causal_lm_class)
    if type(model) not in allowed:
        raise LarosaError(f"a {_name(type(model))}: larosa needs a {allowed[0].__name__} itself")
    expected = _expected(kind, model.config.to_json_string(use_diff=False))
    found = dict(model.named_modules(remove_duplicate=False))
    for name, module in found.items():
        wanted = expected.get(name)
        if wanted is None:
            raise LarosaError(f"module '{name}' ({_name(type(module))}) is none of the model's own: take it out")
        if type(module) is not wanted.kind:
            raise LarosaError(
                f"module '{name}' is a {_name(type(module))}, not a {_name(wanted.kind)}: "
                "larosa needs the plain model, neither quantized nor changed"
            )
        for hooks in _HOOKS:
            for hook in getattr(module, hooks).values():
                if not _of_transformers(hook):
                    raise LarosaError(f"module '{name}' has a hook, which would be lost: remove it first")
        if "forward" in vars(module):
            raise LarosaError(f"module '{name}' has a forward of its own, which would be lost: remove it first")
        shapes = {key: tuple(weight.shape) for key, weight in module.named_parameters(recurse=False)}
        if shapes != wanted.shapes:
            raise LarosaError(
                f"module '{name}' has parameters {shapes}, but the model's configuration makes them {wanted.shapes}"
            )
    if lost := expected.keys() - found.keys():
        raise LarosaError(f"module '{min(lost)}' is not there: larosa needs the whole model")


def _check_storage(model: Any) -> None:
    """Every weight must be in memory, a plain tensor, and nobody else's, but the head may be the embedding's."""
    seen: dict[tuple[torch.device, int], str] = {}
    tied = {f"{name}.weight" for name, module in model.named_modules() if module is model.get_output_embeddings()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.device.type == "meta":
            raise LarosaError(f"weight '{name}' is not in memory: load the model without offloading it")
        if type(weight.data) not in (torch.Tensor, nn.Parameter):
            raise LarosaError(f"weight '{name}' is a {_name(type(weight.data))}: larosa needs plain tensors")
        place = weight.device, weight.data_ptr()
        other = seen.setdefault(place, name)
        if other != name and weight.numel() and name not in tied and other not in tied:
            raise LarosaError(f"'{other}' and '{name}' are one weight: give each its own, as copy.deepcopy does")


def check_changeable(model: Any) -> None:
    """Refuse weights that cannot be changed in place.

    Raises:
        LarosaError: they were made in inference mode, or it is on.
    """
    if torch.is_inference_mode_enabled() or any(weight.is_inference() for weight in model.parameters()):
        raise LarosaError("torch.inference_mode() forbids to change weights: load and convert the model outside of it")


class _Module:
    """What a module should be."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = type(module)
        self.shapes = {key: tuple(weight.shape) for key, weight in module.named_parameters(recurse=False)}


@lru_cache(maxsize=4)
def _expected(model_class: Any, config: str) -> dict[str, _Module]:
    """The modules that a class makes of a configuration."""
    with no_init_weights(), torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(json.loads(config)))
    return {name: _Module(module) for name, module in model.named_modules(remove_duplicate=False)}


def _of_transformers(hook: Any) -> bool:
    """Whether a hook only records outputs, which transformers leaves behind once they have been asked for."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")


def _name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"
