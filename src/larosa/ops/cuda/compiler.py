"""Compilation by NVRTC, with the results kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from larosa.errors import LarosaError

_SOURCES = Path(__file__).parent / "source"
_OPTIONS = ("--std=c++17",)
_DIGEST = hashlib.sha256().digest_size
#: Of the cache. A kernel takes some 30 KB, a model ten of them, and every version of larosa or NVRTC makes others.
_MOST_BYTES = 64 * 2**20


def compiled(source: str, macros: Mapping[str, str], architecture: str) -> bytes:
    """The machine code (cubin) of a file in `source/`, from the cache on disk where it has been compiled before.

    Several processes may fill the cache at once: a file appears under its name when it is complete. A file that
    is damaged is compiled again. Beyond `_MOST_BYTES` those that were not used for longest are removed.

    Args:
        source: its name, such as "linear.cu".
        macros: what the preprocessor is told, by name.
        architecture: such as "sm_90".

    Raises:
        LarosaError: NVRTC is not there, or does not know the architecture.
    """
    options = [*_OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{name}={text}" for name, text in macros.items())]
    path = cache_folder() / f"{_key(source, options)}.cubin"
    code = _read(path)
    if code is None:
        code = _compile(source, options, architecture)
        _write(path, code)
    return code


def cache_folder() -> Path:
    """Where compiled kernels are kept: `LAROSA_CACHE`, or `larosa` in the user's cache folder."""
    chosen = os.environ.get("LAROSA_CACHE")
    if chosen:
        return Path(chosen) / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "larosa" / "cuda"


def _key(source: str, options: list[str]) -> str:
    # Machine code depends on the compiler, not on the driver that loads it.
    key = hashlib.sha256(repr((source, options, _version())).encode())
    for name, text in sorted(_texts().items()):
        key.update(f"{name}\0{text}\0".encode())
    return key.hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    with suppress(OSError):
        os.utime(path)  # used now
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
        _shrink(path.parent)
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept in {path.parent} and are compiled again by the next process "
            f"({error.strerror}); set LAROSA_CACHE to a folder that can be written",
            stacklevel=2,
        )


def _shrink(folder: Path) -> None:
    """Remove what was not used for longest, files of ended processes included, until the rest is small enough."""
    size = 0
    for path, status in sorted(_statuses(folder), key=lambda file: file[1].st_mtime_ns, reverse=True):
        size += status.st_size
        if size > _MOST_BYTES:
            path.unlink(missing_ok=True)


def _statuses(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has removed it
            yield path, path.stat()


@cache
def _texts() -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in _SOURCES.iterdir() if path.suffix in (".cu", ".cuh")}


def _compile(source: str, options: list[str], architecture: str) -> bytes:
    nvrtc = _nvrtc()
    known = _checked(nvrtc.nvrtcGetSupportedArchs())
    if int(architecture.removeprefix("sm_")) not in known:
        raise LarosaError(
            f"NVRTC {_version()} does not compile for {architecture} (it knows {min(known)} to {max(known)}): install "
            "another nvidia-cuda-nvrtc, or set LAROSA_CUDA_KERNELS=triton"
        )
    headers = {name: text for name, text in _texts().items() if name.endswith(".cuh")}
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            _texts()[source].encode(),
            source.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
    )
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source} does not compile with {' '.join(options)}:\n{log.decode().rstrip(chr(0))}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def check_compiler() -> None:
    """Make sure that NVRTC is there.

    Raises:
        LarosaError: it is not.
    """
    _nvrtc()


@cache
def _version() -> str:
    major, minor = _checked(_nvrtc().nvrtcVersion())
    return f"{major}.{minor}"


@cache
def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise missing("NVRTC", error) from error
    return nvrtc


def missing(what: str, error: Exception) -> LarosaError:
    """The error for a part of `larosa[cuda]` that is not there."""
    reason = str(error).partition("\n")[0]
    return LarosaError(
        f"the CUDA kernels need {what} ({reason}): pip install 'larosa[cuda]', or set LAROSA_CUDA_KERNELS=triton"
    )


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status.value != 0:
        raise RuntimeError(f"{status.name} from NVRTC")
    return values[0] if len(values) == 1 else tuple(values)
