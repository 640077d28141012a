"""Tensors kept on disk for a while, where there are too many to hold."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from larosa.errors import LarosaError


class Shelf:
    """Groups of named tensors in files of a temporary folder, read anew each time one is asked for, to the CPU.

    The folder is where the system keeps temporary files (TMPDIR), and goes with the shelf.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="larosa-")
        self._length = 0

    def append(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a group after the others.

        Raises:
            LarosaError: the disk is full, or cannot be written to.
        """
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._file(self._length))
        except (OSError, SafetensorError) as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise LarosaError(
                f"{self._folder.name}: cannot keep {size / 1e9:.2f} GB of calibration here ({error}); "
                "set TMPDIR to a folder with more room"
            ) from error
        self._length += 1

    def pop(self) -> dict[str, torch.Tensor]:
        """The last group, which is taken away."""
        tensors = self[self._length - 1]
        self._length -= 1
        # What is mapped from a file stays readable when its name is gone.
        self._file(self._length).unlink()
        return tensors

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return load_file(self._file(range(self._length)[place]))

    def _file(self, place: int) -> Path:
        return Path(self._folder.name) / f"{place}.safetensors"
