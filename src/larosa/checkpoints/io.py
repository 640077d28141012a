"""Loading dense and converted models, and saving converted ones whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from larosa.architectures import find_architecture
from larosa.checkpoints.config_checks import check_config, check_counts, dry_run
from larosa.checkpoints.gguf import find_gguf, load_gguf, load_gguf_config
from larosa.checkpoints.streaming import load_without_layers, save_with_layers
from larosa.checkpoints.tokenizer_files import check_tokenizer_files, save_tokenizer
from larosa.checkpoints.weight_files import (
    check_dtypes,
    check_loaded,
    check_no_adapter,
    check_no_pointer,
    check_weight_files,
)
from larosa.config.migrations import loading_weights
from larosa.errors import LarosaError
from larosa.models.families import model_class
from larosa.models.plain import check_plain
from larosa.utils.layer_files import is_streamed

_DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


class LoadedModel(NamedTuple):
    """A causal language model in evaluation mode and its tokenizer."""

    model: Any
    tokenizer: Any


def load(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    layer_folder: Path | None = None,
) -> LoadedModel:
    """Load a dense or converted model from a local folder, a GGUF file or the Hugging Face hub.

    Only safetensors and GGUF are read.

    Args:
        path: folder or hub name, or a GGUF file.
        dtype: `auto` (the checkpoint's own; bfloat16 for GGUF), `float16`, `bfloat16`, `float32` or `float64`.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        layer_folder: leave the decoder layers on disk, where a conversion reads one at a time and keeps it in this
            folder once it has changed (`larosa.checkpoints.streaming`); of dense models in local folders, on the CPU.

    Raises:
        LarosaError: missing or corrupt checkpoint, unsupported family, or a bad option.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    target = find_device(device)
    check_dtype(dtype)
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    if (file := find_gguf(path)) is not None and layer_folder is None:
        with quiet_transformers(), loading(path):
            loaded = load_gguf(file, config, chosen or torch.bfloat16)
        return _placed(path, LoadedModel(*loaded), target)
    stored: dict[str, str] = {}
    if Path(path).is_dir():
        stored = check_weight_files(Path(path))
        check_tokenizer_files(Path(path))
    if layer_folder is not None:
        with quiet_transformers(), loading(path):
            model = load_without_layers(Path(path), config, chosen, layer_folder)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        return _placed(path, LoadedModel(model, tokenizer), torch.device("cpu"))
    with quiet_transformers(), loading(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=chosen or dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_loaded(path, info)
    check_dtypes(path, model, stored)
    return _placed(path, LoadedModel(model, tokenizer), target)


def check_dtype(name: str) -> None:
    """Refuse what no model can be loaded in.

    Raises:
        LarosaError: an unknown number format.
    """
    if name not in _DTYPES:
        raise LarosaError(f"unknown dtype '{name}': one of {', '.join(_DTYPES)}")


def _placed(path: str, loaded: LoadedModel, target: torch.device) -> LoadedModel:
    model, tokenizer = loaded
    check_plain(model)
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
        with quiet_transformers(), loading(path):
            return load_gguf_config(gguf)
    folder = Path(path)
    if folder.is_dir():
        check_no_adapter(folder)
        _check_type(folder / "config.json")
    elif folder.exists():
        raise LarosaError(
            f"{path}: a file, but a model is a *.gguf file or a folder with config.json and *.safetensors"
        )
    elif _means_a_folder(path):
        raise LarosaError(f"{path}: no such folder")
    with quiet_transformers(), loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    find_architecture(config.model_type)
    if getattr(config, "quantization_config", None):
        raise LarosaError(f"{path}: the checkpoint is quantized; convert the original weights instead")
    check_config(path, config)
    with quiet_transformers(), loading(path), loading_weights():
        dry_run(model_class(config), config)
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


def _check_type(file: Path) -> None:
    """Make sure that a config.json is of a supported family, before transformers reads it."""
    if not file.is_file():
        raise LarosaError(f"{file.parent}: no config.json in this folder")
    check_no_pointer(file)
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LarosaError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise LarosaError(f"{file}: no key 'model_type'")
    check_counts(str(file.parent), content)
    find_architecture(content["model_type"])


def _means_a_folder(path: str) -> bool:
    """Whether a name that is no folder cannot be one of the hub's either, which are NAME or OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/") or "\\" in path


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn any exception of a failed load into one line that names the model.

    Of any type: transformers raises what it likes at what it did not foresee, and a list of types always lacks one.
    """
    try:
        yield
    except LarosaError:
        raise
    except Exception as error:
        raise LarosaError(f"{path}: cannot be loaded ({_one_line(error)})") from error


#: Longer messages of others end with advice on their own options.
_LONGEST = 300


def _one_line(error: Exception) -> str:
    """What an exception says, whole sentences of it, in one line."""
    text = " ".join(str(error).split())
    if " " not in text:  # no more than a key, or nothing
        text = f"{type(error).__name__} {text}".strip()
    if "is not a local folder and is not a valid model identifier" in text:
        return "no such folder, and no such model on the Hugging Face hub; a private one needs `hf auth login`"
    if len(text) <= _LONGEST:
        return text
    end = text.rfind(". ", 0, _LONGEST)
    return text[: end + 1] if end > 0 else text[:_LONGEST] + "..."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers say nothing for the time being."""
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


def check_output(folder: Path, max_shard_size: str = "5GB") -> None:
    """Make sure that a checkpoint can be written to `folder`, by making and removing a folder beside it.

    Raises:
        LarosaError: it exists, its name is too long, its parent folder does not exist or cannot be written to, or
            `max_shard_size` is no size.
    """
    try:
        if os.path.lexists(folder):
            raise LarosaError(f"{folder}: exists already; name a new folder or remove it")
        os.lstat(folder.absolute().parent)
        if not folder.absolute().parent.is_dir():
            raise LarosaError(f"{folder.absolute().parent}: no such folder")
        folder.parent.joinpath(folder.name + LOG_SUFFIX).exists()  # a search's log has a longer name still
    except LarosaError:
        raise
    except FileNotFoundError:
        raise LarosaError(f"{folder.absolute().parent}: no such folder") from None
    except (OSError, ValueError) as error:
        raise LarosaError(f"{folder}: {getattr(error, 'strerror', None) or error}") from None
    if not re.fullmatch(r"0*[1-9][0-9]*[KMGT]B", max_shard_size.upper()):
        raise LarosaError(f"--max-shard-size '{max_shard_size}': give a number and KB, MB, GB or TB, as in 5GB")
    with _partial(folder):
        pass


#: Where a search keeps its points is named after the output.
LOG_SUFFIX = ".search.jsonl"


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, gone afterwards unless it has been renamed."""
    # Its name is known before it is made: an interrupt at any moment finds it.
    partial = folder.absolute().parent / f".larosa-{secrets.token_hex(8)}.partial"
    try:
        try:
            partial.mkdir()
        except OSError as error:
            raise LarosaError(f"{partial.parent}: cannot be written to ({error.strerror})") from None
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    card: str,
    max_shard_size: str = "5GB",
    *,
    source: str | None = None,
    trust_remote_code: bool = False,
    log: Path | None = None,
) -> None:
    """Write a converted model, its tokenizer and its card to a new folder, whole or not at all.

    Args:
        card: what README.md says.
        max_shard_size: largest weight file to write; a layer that is on disk is one whatever its size.
        source: folder or hub name that the tokenizer was loaded from: its files are copied as they are.
        trust_remote_code: as it was loaded with.
        log: of a search, to be kept as search.jsonl; it is removed from where it was.

    Raises:
        LarosaError: the folder exists or cannot be written, the disk is full, or the tokenizer would give other
            tokens when loaded again.
    """
    folder = Path(folder).absolute()
    check_output(folder, max_shard_size)
    try:
        with _partial(folder) as partial:
            with quiet_transformers():
                if is_streamed(model):
                    save_with_layers(model, partial, max_shard_size)
                else:
                    model.save_pretrained(partial, max_shard_size=max_shard_size)
                save_tokenizer(tokenizer, partial, source, trust_remote_code)
            (partial / "README.md").write_text(card, "utf-8")
            if log is not None:
                shutil.copyfile(log, partial / "search.jsonl")
            partial.rename(folder)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            raise LarosaError(f"{folder}: no space left on the disk; nothing was written") from None
        if isinstance(error, OSError):
            raise LarosaError(f"{folder}: {error.strerror or error}; nothing was written") from None
        raise
    if log is not None:
        log.unlink()
