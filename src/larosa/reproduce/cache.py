"""Measurements on disk, one file each, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from larosa.errors import LarosaError
from larosa.version import source_digest

#: Files that decide what a checkpoint computes.
_FINGERPRINTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "vocab*", "merges.txt")


class Cache:
    """Results of single measurements, found again by everything that they depend on.

    A result's file is named by a hash of the model's fingerprint, larosa's source and the measurement's
    settings, so that a changed setting is a different file: nothing is ever mixed or overwritten.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._identity = {"model": fingerprint, "larosa": source_digest()}

    def get(self, kind: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a measurement, from disk or else measured now and kept.

        Args:
            kind: what is measured.
            settings: everything else that the result depends on; must survive JSON.
            measure: gives the result; must survive JSON.
        """
        request = json.loads(json.dumps({"kind": kind, **self._identity, "settings": settings}))
        path = self._path(kind, request, ".json")
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["request"] == request:
                return dict(content["result"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not measured yet, or a file that is damaged: measure
        # Through JSON, so that a first run gives exactly what a later one reads.
        result: dict[str, Any] = json.loads(json.dumps(measure()))
        write_whole(path, json.dumps({"request": request, "result": result}, indent=1) + "\n")
        return result

    def log(self, kind: str, settings: dict[str, Any]) -> Path:
        """Where a measurement that takes long may keep what it has so far, line by line."""
        return self._path(kind, {"kind": kind, **self._identity, "settings": settings}, ".jsonl")

    def _path(self, kind: str, request: dict[str, Any], ending: str) -> Path:
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{kind}-{key[:24]}{ending}"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either complete or not there.

    Raises:
        LarosaError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise LarosaError(f"{path}: {error.strerror}") from None
    finally:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)


def fingerprint(path: str, config: Any) -> str:
    """A hash of a checkpoint's weights, configuration and tokenizer; of a hub model, its commit."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FINGERPRINTED for file in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
