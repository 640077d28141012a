"""Runs the kernels of `larosa/ops/cuda/source` on a CPU, one fiber a thread, through the product's own launches."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from larosa.ops.cuda import compiler, kernels
from larosa.ops.cuda.launch import Argument, Grid, Machine, addresses_of

_HERE = Path(__file__).parent
_SOURCES = Path(kernels.__file__).parent / "source"
_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


class Emulator:
    """Stands in for a GPU: what `larosa.ops.cuda.launch` gives the kernels, on CPU tensors.

    Args:
        folder: for the compiled kernels, which the next run uses again where nothing they are made of has changed.
        gpu: the GPU that launches are planned for.
    """

    def __init__(self, folder: Path, gpu: Machine) -> None:
        self.folder = folder
        self.gpu = gpu
        self.order = 0  # in which threads take turns: 0 ascending, 1 descending, else a shuffle

    def machine(self, device: torch.device) -> Machine:
        return self.gpu

    def launch(
        self,
        device: torch.device,
        source: str,
        kernel: str,
        macros: Mapping[str, str],
        grid: Grid,
        arguments: Sequence[Argument],
    ) -> None:
        library = _library(self.folder, source, kernel, tuple(sorted(macros.items())))
        shared = ctypes.c_uint.in_dll(library, "shared_bytes").value
        if shared > self.gpu.shared_memory or (grid.cluster > 1 and not self.gpu.overlaps):
            raise RuntimeError(f"{kernel} {dict(macros)}: {self.gpu} has no clusters, or no {shared} bytes for a block")
        failure = library.run(grid.x, grid.y, grid.cluster, grid.threads, self.order, addresses_of(arguments))
        if failure is not None:
            raise RuntimeError(f"{kernel} {dict(macros)}: {failure.decode()}")


@cache
def _library(folder: Path, source: str, kernel: str, macros: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    defines = [f"-D{name}={text}" for name, text in (*macros, ("SOURCE_FILE", f'"{source}"'), ("ENTRY", kernel))]
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *defines]
    path = folder / (hashlib.sha256(repr((command, _ingredients())).encode()).hexdigest() + ".so")
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")  # another worker may compile the same
        subprocess.run([*command, f"-I{_SOURCES}", _HERE / "main.cpp", "-o", unfinished], check=True)
        unfinished.replace(path)
        compiler._shrink(folder)
    os.utime(path)  # used now
    library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_char_p
    return library


@cache
def _ingredients() -> str:
    """Of the compiler and of every source that it may read."""
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout
    files = (path for folder in (_HERE, _SOURCES) for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return repr((version, [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(files)]))
