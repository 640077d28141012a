"""Text behind one interface, a name, a file or a folder, and its tokens."""

from __future__ import annotations

import json
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from larosa.errors import LarosaError

BUNDLED = "bundled"

#: Documents read from a streamed data set; 16 x 2048 tokens need a few hundred.
_STREAMED_DOCUMENTS = 4096


#: Endings of files that are text themselves (those of WikiText among them), and of JSON objects, one a line. Others
#: are refused: what a table or an archive holds is not what a model should read.
_TEXT = ("", ".txt", ".text", ".md", ".raw", ".tokens")
_LINES = (".jsonl", ".ndjson")
_IN_FOLDERS = (".txt", ".json", ".jsonl")


class TextSplit(StrEnum):
    """Which part of a data set: what calibration reads must not be what evaluation reads."""

    TRAIN = "train"
    TEST = "test"


def check_text(text: str, name: str) -> None:
    """Refuse what is no Unicode text: Python passes on what it could not decode as lone surrogates.

    Raises:
        LarosaError: the message gives `name` and the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LarosaError(f"{name}: not UTF-8 text (character {error.start + 1})") from None


def tokenize(text: str, tokenizer: Any, vocab_size: int, special: bool = True) -> torch.Tensor:
    """All of `text` as one row of token ids, int64, with the tokenizer's usual special tokens unless not `special`.

    Raises:
        LarosaError: it is no Unicode text, or an id is outside the model's vocabulary.
    """
    check_text(text, "the text")
    # verbose=False: a text longer than the model's context is meant, it is cut into windows.
    ids = torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= vocab_size:
        raise LarosaError(
            f"the tokenizer gives token id {int(ids.max())} but the model's vocabulary has {vocab_size}: "
            "tokenizer and model do not belong together"
        )
    return ids


def read_text(source: str, split: TextSplit) -> str:
    """The text of a named source, a file or a folder, joined as the GPTQ and SliceGPT papers join it.

    Raises:
        LarosaError: the source is unknown, unreadable, empty or of an unknown format.
    """
    if source == BUNDLED:
        return resources.files("larosa.assets").joinpath("evaluation.txt").read_text("utf-8")
    if source in _DATASETS:
        return "\n\n".join(_DATASETS[source](split))
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _IN_FOLDERS and p.is_file())
        if not files:
            raise LarosaError(f"{path}: no .txt, .json or .jsonl file in this folder")
    elif path.is_file():
        files = [path]
    else:
        names = ", ".join(sorted([*_DATASETS, BUNDLED]))
        raise LarosaError(f"'{source}' is neither a file or folder nor one of: {names}")
    text = "\n\n".join(_read_file(file) for file in files)
    if not text.strip():
        raise LarosaError(f"{path}: no text in it")
    return text


def _read_file(path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in (*_TEXT, *_LINES, ".json"):
        raise LarosaError(f"{path}: of an unknown format '{kind}'; give .txt, .json or .jsonl")
    try:
        text = path.read_text("utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise LarosaError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise LarosaError(f"{path}: {error.strerror}") from None
    if kind in _TEXT:
        return text
    if kind == ".json":
        return "\n\n".join(_records(path, text))
    documents = []
    # Not splitlines(), which also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                documents.append(_document(json.loads(line)))
            except _NO_DOCUMENT:
                raise LarosaError(f"{path}, line {number}: not {_DOCUMENT}") from None
    return "\n\n".join(documents)


def _records(path: Path, text: str) -> list[str]:
    """The documents of a JSON file: a list of records, or one that stands under one key, as data sets are exported."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LarosaError(f"{path}: not valid JSON ({error}); one record a line is .jsonl") from None
    if isinstance(content, dict) and "text" not in content and len(content) == 1:
        (content,) = content.values()
    rows = content if isinstance(content, list) else [content]
    documents = []
    for number, row in enumerate(rows, start=1):
        try:
            documents.append(_document(row))
        except _NO_DOCUMENT:
            raise LarosaError(f"{path}, record {number}: not {_DOCUMENT}") from None
    return documents


_NO_DOCUMENT = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
_DOCUMENT = "a JSON object with a 'text' key (or Alpaca's 'instruction' and 'output')"


def _document(row: dict[str, str]) -> str:
    if "text" in row:
        return row["text"] + ""  # a value that is no string raises TypeError
    parts = [row["instruction"], row.get("input", ""), row["output"]]
    return "\n".join(part for part in parts if part)


def _load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise LarosaError(f"data set '{name}' needs the extra: pip install 'larosa[data]'") from None
    try:
        return load_dataset(name, *args, **kwargs)
    except Exception as error:  # datasets raises many types when a download fails; each means the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LarosaError(f"data set '{name}' could not be loaded ({reason}); give a local file instead") from None


def _wikitext2(split: TextSplit) -> list[str]:
    return list(_load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=str(split))["text"])


def _alpaca(split: TextSplit) -> list[str]:
    return list(_load_dataset("tatsu-lab/alpaca", split="train")["text"])


def _c4(split: TextSplit) -> list[str]:
    part = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
    rows = _load_dataset("allenai/c4", data_files=part[split], split="train", streaming=True)
    return [row["text"] for row in rows.take(_STREAMED_DOCUMENTS)]


_DATASETS = {"wikitext2": _wikitext2, "alpaca": _alpaca, "c4": _c4}
