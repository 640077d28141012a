"""Runs the kernels of `larosa/ops/cuda/source` on a CPU, one fiber a thread, through the product's own launches."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from larosa.ops.cuda import kernels
from larosa.ops.cuda.launch import Argument, Grid, Machine, addresses_of

_HERE = Path(__file__).parent
_SOURCES = Path(kernels.__file__).parent / "source"


class Emulator:
    """Stands in for a GPU: what `larosa.ops.cuda.launch` gives the kernels, on CPU tensors.

    Args:
        folder: for the compiled kernels.
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
    path = folder / (hashlib.sha256(repr((source, kernel, macros)).encode()).hexdigest() + ".so")
    defines = [f"-D{name}={text}" for name, text in (*macros, ("SOURCE_FILE", f'"{source}"'), ("ENTRY", kernel))]
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            f"-I{_SOURCES}",
            *defines,
            "-o",
            path,
            _HERE / "main.cpp",
        ],
        check=True,
    )
    library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_char_p
    return library
