"""Corpus files: plain or xz-compressed UTF-8 text, documents separated by a `<|doc|>` line."""

from __future__ import annotations

import lzma
import random
from collections.abc import Sequence
from pathlib import Path

SEPARATOR = "<|doc|>"
SUFFIXES = (".txt", ".txt.xz")


class RecipeError(Exception):
    """A mistake the user can mend; printed as one line, without a traceback."""


def find_files(sources: Sequence[Path]) -> list[Path]:
    """Expand folders into their corpus files, in name order so that runs repeat."""
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = sorted(path for path in source.iterdir() if path.name.endswith(SUFFIXES))
            if not found:
                raise RecipeError(f"no *.txt or *.txt.xz file in corpus folder {source}")
            files += found
        elif source.is_file():
            files.append(source)
        else:
            raise RecipeError(f"corpus file not found: {source}")
    return files


def read_file(path: Path) -> list[str]:
    try:
        if path.name.endswith(".xz"):
            with lzma.open(path, "rt", encoding="utf-8", newline="") as handle:
                text = handle.read()
        else:
            text = path.read_bytes().decode("utf-8")
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read corpus file {path}: {error}") from error
    documents: list[str] = []
    lines: list[str] = []
    for line in [*text.split("\n"), SEPARATOR]:
        if line.rstrip("\r") == SEPARATOR:
            document = "\n".join(lines).strip("\n")
            if document.strip():
                documents.append(document)
            lines = []
        else:
            lines.append(line)
    return documents


def read_documents(sources: Sequence[Path]) -> list[str]:
    documents = [document for path in find_files(sources) for document in read_file(path)]
    if not documents:
        raise RecipeError("the corpus is empty: no document in " + ", ".join(map(str, sources)))
    return documents


def split_holdout(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle whole documents, then set a fraction of them aside for the validation loss."""
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    held = round(len(shuffled) * fraction)
    if fraction > 0:
        held = max(held, 1)
    if held >= len(shuffled):
        raise RecipeError(f"holding out {fraction} leaves none of {len(shuffled)} documents")
    return shuffled[held:], shuffled[:held]
