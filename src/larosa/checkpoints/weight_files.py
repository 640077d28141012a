"""What lies in a model's folder: looked at before transformers does, which takes and drops things without a word."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from larosa.errors import LarosaError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_POINTER = b"version https://git-lfs.github.com/spec"
#: Of a dense model's weights and of 8-bit adapters; anything else is quantised, or was not written as weights.
_DTYPES = ("F16", "BF16", "F32", "F64", "I8")
#: What safetensors calls the dtypes that are a matter of the format and not of the model.
_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16"}
#: The first that matches what is there in place of weights says what to do about it.
_INSTEAD = (
    ("adapter_model.*", "only an adapter: merge it into its model first (peft: merge_and_unload)"),
    ("consolidated*.safetensors", "weights under Mistral's own names: take the files that transformers reads"),
    ("model-*-of-*.safetensors", f"shards without their index: {INDEX} says which weights are where"),
    ("model.*.safetensors", f"a variant of the weights: rename it to {SINGLE}"),
    ("*.safetensors", f"of another name: rename it to {SINGLE}"),
    ("*.bin", "pickled: larosa reads safetensors only, never pickled weights"),
    ("*.pt", "pickled: larosa reads safetensors only, never pickled weights"),
    ("*.pth", "pickled: larosa reads safetensors only, never pickled weights"),
)


class StoredWeight(NamedTuple):
    """A weight's file, its dtype as safetensors calls it, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def check_no_adapter(folder: Path) -> None:
    """Refuse a folder with a LoRA adapter: transformers would put it into the model where peft is installed.

    Raises:
        LarosaError: there is one.
    """
    if not (folder / ADAPTER).is_file():
        return
    if (folder / "config.json").is_file():
        mend = "merge it into the model (peft: merge_and_unload), or move it out of the folder"
    else:
        mend = "an adapter, not a model: merge it into its model first (peft: merge_and_unload)"
    raise LarosaError(f"{folder / ADAPTER}: {mend}")


def check_weight_files(folder: Path) -> dict[str, str]:
    """Make sure that the weights that transformers would read are whole, and say which are not.

    Returns:
        The dtype of each, as safetensors calls it.

    Raises:
        LarosaError: a file is missing, damaged, a pointer of git-lfs, of a format that is never read, or holds a
            weight that another holds too.
    """
    seen: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    for name in weight_files(folder):
        file = folder / name
        if not file.is_file():
            raise LarosaError(f"{file}: missing, and {INDEX} names it")
        check_no_pointer(file)
        for key, (_, dtype, _) in _stored(file).items():
            if key in seen:
                raise LarosaError(f"{file}: holds '{key}', which {seen[key]} holds too")
            if dtype not in _DTYPES and not (dtype == "U8" and key.endswith(".codes")):
                raise LarosaError(f"{file}: '{key}' is {dtype}, a quantized weight; convert the original weights")
            seen[key], dtypes[key] = name, dtype
    return dtypes


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """The weights of a checkpoint in safetensors by name, once `check_weight_files` has found it whole."""
    return {key: found for name in weight_files(folder) for key, found in _stored(folder / name).items()}


def check_no_pointer(file: Path) -> None:
    """Refuse what git leaves in a large file's place where git-lfs is not installed.

    Raises:
        LarosaError: that is what the file is.
    """
    with file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            raise LarosaError(f"{file}: a git-lfs pointer, not the file itself: run git lfs pull")


def check_loaded(path: str, info: dict[str, Any]) -> None:
    """Refuse a load that left something out, which transformers only warns of.

    What is missing it fills with random numbers, and what the configuration does not expect it drops.

    Args:
        path: of the model, for the message.
        info: as `from_pretrained(output_loading_info=True)` gives it.

    Raises:
        LarosaError: weights are missing, unexpected or of another shape; the first is named.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise LarosaError(
            f"{path}: '{name}' is stored as {list(stored)}, but config.json makes it {list(wanted)}"
            f"{_more(mismatched, 'weight differs', 'weights differ')}"
        )
    if missing := sorted(info["missing_keys"]):
        raise LarosaError(f"{path}: weights are missing, {len(missing)} in all; the first is '{missing[0]}'")
    if unexpected := sorted(info["unexpected_keys"]):
        raise LarosaError(
            f"{path}: '{unexpected[0]}' is stored, but config.json makes a model without it"
            f"{_more(unexpected, 'weight is', 'weights are')}; is it the right config.json, are the weights quantized?"
        )
    if info.get("error_msgs"):
        raise LarosaError(f"{path}: cannot be loaded ({info['error_msgs'][0]})")


def check_dtypes(path: str, model: Any, stored: Mapping[str, str]) -> None:
    """Refuse whole numbers, or scales of them, that were stored as something else: transformers has converted them.

    Args:
        path: of the model, for the message.
        model: as it was loaded.
        stored: as `check_weight_files` gives it.

    Raises:
        LarosaError: the message names the weight.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not name.endswith(".scales"):
            continue
        wanted = _NAMES[weight.dtype]
        if stored.get(name, wanted) != wanted:
            raise LarosaError(f"{path}: '{name}' is stored as {stored[name]}, but config.json makes it {wanted}")


def _more(found: Iterable[object], one: str, several: str) -> str:
    others = len(list(found)) - 1
    return "" if not others else f" ({others} more {one if others == 1 else several} so)"


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold a folder's weights, as transformers finds them.

    Raises:
        LarosaError: there are none, or their index is no index.
    """
    # In the order of transformers: a single file goes before an index, which may be left over from other weights.
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise LarosaError(_what_instead(folder))
    check_no_pointer(index)
    try:
        content = json.loads(index.read_text("utf-8"))
        names = set(content["weight_map"].values())
        content["metadata"].keys()  # transformers wants it
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LarosaError(f"{index}: not a valid safetensors index") from None
    if not names or not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
        raise LarosaError(f"{index}: not a valid safetensors index")
    return sorted(names)


def _what_instead(folder: Path) -> str:
    for pattern, what in _INSTEAD:
        for file in sorted(folder.glob(pattern)):
            return f"{folder / SINGLE}: missing; {file.name} is {what}"
    return f"{folder / SINGLE}: missing, and there are no other weights in this folder"


def _stored(file: Path) -> dict[str, StoredWeight]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - not a dict
            return {key: StoredWeight(file, x.get_dtype(), tuple(x.get_shape())) for key, x in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise LarosaError(f"{file}: corrupt or incomplete ({error})") from None
