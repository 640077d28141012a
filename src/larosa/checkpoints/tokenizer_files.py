"""A converted model's tokenizer: its source's own files, and the proof that they give the same tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from larosa.checkpoints.weight_files import check_no_pointer
from larosa.errors import LarosaError

_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*",
    "tekken.json",
    "chat_template*",
)
#: What tokenizers have been seen to differ in: spaces, line ends, other scripts, bytes, special tokens in the text.
_PROBES = (
    "",
    " ",
    "Hello world, it's 3.14!",
    "  two leading, two trailing  ",
    "\n\ttabs\r\n and   spaces\n\n\n",
    "ភាសាខ្មែរ 日本語 Ünïcödé 👩‍👩‍👧 \u0000\u200b",
    "def f(x):\n    return x ** 2  # ▁",
    "w5 w6 w7",
    "<s>a</s> b<unk>c <|endoftext|> d<|im_end|>\n",
)


#: Not padding_side: callers set it for a batch, and save_pretrained does not write it.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template")

#: One of them a tokenizer is read from.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "spiece.model", "tekken.json")


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a vocabulary: transformers makes an empty tokenizer then.

    Raises:
        LarosaError: there is none, or a pointer of git-lfs in its place.
    """
    found = [file for pattern in _VOCABULARIES for file in sorted(folder.glob(pattern))]
    for file in found:
        check_no_pointer(file)
    config = folder / "tokenizer_config.json"
    if not found and not (config.is_file() and "auto_map" in config.read_text("utf-8", errors="replace")):
        raise LarosaError(
            f"{folder}: no tokenizer in this folder; put tokenizer.json and its companions beside the model"
        )


def save_tokenizer(tokenizer: Any, folder: Path, source: str | None = None, trust_remote_code: bool = False) -> None:
    """Put a tokenizer into the folder of a saved model, so that what is loaded from there gives the same tokens.

    Args:
        tokenizer: in memory.
        folder: of the saved model, its configuration included: the model's type has a say in what is loaded.
        source: folder or hub name that the tokenizer was loaded from, whose files are copied as they are; None
            takes its `name_or_path`, and writes files anew where that is no source either.
        trust_remote_code: as it was loaded with.

    Raises:
        LarosaError: neither way gives the same tokens.
    """
    found = _source_folder(source or str(getattr(tokenizer, "name_or_path", "")))
    if found is not None:
        _copy_files(found, folder)
        if _alike(tokenizer, folder, trust_remote_code):
            return
    written = {str(Path(name).relative_to(folder)) for name in tokenizer.save_pretrained(folder)}
    if _alike(tokenizer, folder, trust_remote_code):
        return
    # A token set for padding since it was loaded may be lost; the tokens that a text gives may not.
    if found is not None:
        _copy_files(found, folder)
        if _alike(tokenizer, folder, trust_remote_code, but="pad_token_id"):
            return
    raise LarosaError(
        f"{tokenizer.__class__.__name__}: saved and loaded again it gives other tokens; give one that was loaded "
        f"with AutoTokenizer and not changed since (wrote {', '.join(sorted(written))})"
    )


def _source_folder(source: str) -> Path | None:
    """Where the files of a tokenizer are; of a hub model, in the cache, where loading has put them."""
    if not source:
        return None
    if Path(source).exists():
        return Path(source) if Path(source).is_dir() else None  # a GGUF file holds its tokenizer
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        try:
            file = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except OSError:  # a folder that is no more
            return None
        if file is not None:
            return Path(file).parent
    return None


def _copy_files(source: Path, folder: Path) -> None:
    for pattern in _FILES:
        for path in source.glob(pattern):
            _copy(path, folder / path.name)


def _copy(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, target)  # not its mode: a file of the hub's cache may be read-only


def _alike(tokenizer: Any, folder: Path, trust_remote_code: bool, but: str | None = None) -> bool:
    """Whether what is loaded from a folder does as a tokenizer does; `but` names a property that may differ."""
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # of many types; each means that this way does not do
        return False
    names = [name for name in _KEPT if name != but]
    return (
        len(loaded) == len(tokenizer)
        and all(getattr(loaded, name, None) == getattr(tokenizer, name, None) for name in names)
        and all(_behaviour(loaded, text) == _behaviour(tokenizer, text) for text in _PROBES)
    )


def _behaviour(tokenizer: Any, text: str) -> tuple[list[int], str, str]:
    ids = tokenizer(text)["input_ids"]
    return ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)
