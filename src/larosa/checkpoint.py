"""Loading dense and converted models, and saving converted ones whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import larosa.models  # noqa: F401 - registers the sparsified families
from larosa.architectures import find_architecture
from larosa.errors import LarosaError
from larosa.gguf import find_gguf, load_gguf, load_gguf_config

_DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


class LoadedModel(NamedTuple):
    """A causal language model in evaluation mode and its tokenizer."""

    model: Any
    tokenizer: Any


def load(path: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False) -> LoadedModel:
    """Load a dense or converted model from a local folder, a GGUF file or the Hugging Face hub.

    Only safetensors and GGUF are read.

    Args:
        path: folder or hub name, or a GGUF file.
        dtype: `auto` (the checkpoint's own; bfloat16 for GGUF), `float16`, `bfloat16`, `float32` or `float64`.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        LarosaError: missing or corrupt checkpoint, unsupported family, or a bad option.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    target = find_device(device)
    if dtype not in _DTYPES:
        raise LarosaError(f"unknown dtype '{dtype}': one of {', '.join(_DTYPES)}")
    if (file := find_gguf(path)) is not None:
        with _quiet_transformers(), _loading(path):
            loaded = load_gguf(file, config, torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
        return _placed(path, LoadedModel(*loaded), target)
    if Path(path).is_dir():
        _check_weight_files(Path(path))
    with _quiet_transformers(), _loading(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    # transformers fills missing weights with random numbers and only warns.
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise LarosaError(f"{path}: {len(info['missing_keys'])} weights are missing, the first is '{first}'")
    return _placed(path, LoadedModel(model, tokenizer), target)


def _placed(path: str, loaded: LoadedModel, target: torch.device) -> LoadedModel:
    model, tokenizer = loaded
    try:
        model.to(target)
    except torch.OutOfMemoryError:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        raise LarosaError(f"{path} needs {size / 1e9:.1f} GB, which {target} does not have free") from None
    return LoadedModel(model.eval().requires_grad_(False), tokenizer)


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a supported dense or converted model.

    Raises:
        LarosaError: there is none, it is malformed, or the family is not supported.
    """
    if (gguf := find_gguf(path)) is not None:
        with _quiet_transformers(), _loading(path):
            return load_gguf_config(gguf)
    folder = Path(path)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise LarosaError(f"{path}: no config.json in this folder")
        try:
            content = json.loads(file.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LarosaError(f"{file}: not valid JSON ({error})") from None
        if not isinstance(content, dict) or "model_type" not in content:
            raise LarosaError(f"{file}: no key 'model_type'")
        find_architecture(content["model_type"])
    elif folder.exists():
        raise LarosaError(
            f"{path}: a file, but a model is a *.gguf file or a folder with config.json and *.safetensors"
        )
    with _quiet_transformers(), _loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    find_architecture(config.model_type)
    if getattr(config, "quantization_config", None):
        raise LarosaError(f"{path}: the checkpoint is quantized; convert the original weights instead")
    return config


def find_device(name: str) -> torch.device:
    """The torch device of an option's value; `auto` is CUDA where there is one.

    Raises:
        LarosaError: unknown, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LarosaError(f"unknown device '{name}': auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LarosaError(f"device '{name}' asked for, but {torch.cuda.device_count()} CUDA devices are visible")
    return device


def _check_weight_files(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise LarosaError(f"{index}: not a valid safetensors index") from None
    else:
        names = ["model.safetensors"]
    for name in names:
        file = folder / name
        if not file.is_file():
            raise LarosaError(f"{file}: missing; larosa reads safetensors only, never pickled weights")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise LarosaError(f"{file}: corrupt or incomplete ({error})") from None


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Turn the many exceptions of a failed load into one line that names the model."""
    try:
        yield
    except LarosaError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LarosaError(f"{path}: cannot be loaded ({lines[0] if lines else type(error).__name__})") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    # Its progress bars would run into larosa's; its warnings are errors here.
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def check_output(folder: Path) -> None:
    """Make sure that a checkpoint can be written to `folder`.

    Raises:
        LarosaError: it exists, or its parent folder does not.
    """
    if folder.exists():
        raise LarosaError(f"{folder}: exists already; name a new folder or remove it")
    if not folder.absolute().parent.is_dir():
        raise LarosaError(f"{folder.absolute().parent}: no such folder")


def save(model: Any, tokenizer: Any, folder: Path, card: str, max_shard_size: str = "5GB") -> None:
    """Write a converted model, its tokenizer and its card to a new folder, whole or not at all.

    Raises:
        LarosaError: the folder exists or the disk is full.
    """
    check_output(folder)
    folder = folder.absolute()
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        with _quiet_transformers():
            model.save_pretrained(partial, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, "utf-8")
        partial.chmod(0o755)  # mkdtemp makes it private, a checkpoint is not
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        raise LarosaError(f"{folder}: no space left on the disk; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
