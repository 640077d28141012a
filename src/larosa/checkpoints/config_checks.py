"""A configuration looked at before any weight is read: what transformers takes and only trips over later."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeGuard

import torch

from larosa.errors import LarosaError

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
#: Beyond these even shapes alone fill the memory.
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000
#: What makes a model answer in another form than larosa reads, whatever else it says.
_FORM = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "use_cache": True}
_PROBE_TOKENS = 2
#: What has been run dry: one command loads the same configuration several times, and shapes alone take seconds of
#: a model of many layers.
_ran_dry: set[tuple[type[Any], str]] = set()


def check_counts(path: str, content: dict[str, Any]) -> None:
    """Refuse counts for each of which transformers would make an entry before anybody can look at them.

    Args:
        path: of the model, for the message.
        content: of config.json, as it is.

    Raises:
        LarosaError: the message names the key.
    """
    for key in ("num_hidden_layers", "num_labels", "max_window_layers"):
        value = content.get(key)
        if isinstance(value, (int, float)) and not abs(value) <= _MOST_LAYERS:
            raise _wrong(path, key, value, f"must be at most {_MOST_LAYERS}")


def check_config(path: str, config: Any) -> None:
    """Refuse a configuration that no model can be made of, and reset what only changes the form of its output.

    Args:
        path: of the model, for the message.
        config: of a supported family; `return_dict` and the like are put right in place.

    Raises:
        LarosaError: the message names the key.
    """
    for key in _SIZES:
        value = getattr(config, key, None)
        most = _MOST_LAYERS if key == "num_hidden_layers" else _MOST
        if not _is_whole(value) or not 1 <= value <= most:
            raise _wrong(path, key, value, f"must be a whole number of 1 to {most}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise _wrong(
            path, "num_key_value_heads", config.num_key_value_heads, f"must divide {config.num_attention_heads} heads"
        )
    if not isinstance(config.rms_norm_eps, (int, float)) or not 0 <= config.rms_norm_eps < 1:
        raise _wrong(path, "rms_norm_eps", config.rms_norm_eps, "must be a small number")
    for key in ("bos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        if value is not None and not (_is_whole(value) and -1 <= value < config.vocab_size):
            raise _wrong(path, key, value, f"must be one token of the vocabulary of {config.vocab_size}")
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) != config.num_hidden_layers:
        raise _wrong(
            path, "layer_types", f"of {len(kinds)}", f"must be one for each of {config.num_hidden_layers} layers"
        )
    dtype = config.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise _wrong(path, "dtype", str(dtype), "must be float16, bfloat16, float32 or float64")
    for key, value in _FORM.items():
        if getattr(config, key, value) != value:
            setattr(config, key, value)


@torch.inference_mode()
def dry_run(model_class: type[Any], config: Any) -> None:
    """Run a model of this configuration without weights, on shapes alone: what fails here fails for every prompt.

    Once in a process, for each class and content of the configuration.

    Raises:
        Exception: of any type, as the model raises it.
    """
    run = model_class, repr({key: value for key, value in vars(config).items() if key != "_name_or_path"})
    if run in _ran_dry:
        return
    with torch.device("meta"):
        model = model_class(config).eval()
    # An operation that needs numbers is not implemented for shapes alone: then they do not tell.
    with suppress(NotImplementedError):
        model(torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="meta"))
    _ran_dry.add(run)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(path: str, key: str, value: Any, what: str) -> LarosaError:
    return LarosaError(f"{path}: config.json, key '{key}': {value!r} {what}")
