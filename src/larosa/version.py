"""The package version, in one place for code and checkpoints, and what tells states of one version apart."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

__version__ = version("larosa")

_SOURCES = (".py", ".cu", ".cuh", ".h", ".cpp")


@cache
def source_digest() -> str:
    """A hash of the package's source, of all languages: what is kept on disk between changes of it is named by this."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in _SOURCES):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
