"""Decoder layers on disk, in memory only while they are in use: for models larger than the memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from larosa.errors import LarosaError


class LayerFile:
    """The matrices of a layer on disk: in the shards of its checkpoint or, once they have changed, in their own file.

    Norms, biases and scores stay in memory, for they take next to nothing. A matrix that is not in memory keeps its
    shape and dtype, reads as NaN and cannot be copied to, so that nobody takes it for one that is.

    Args:
        prefix: of the layer's names in the state dict, without the last dot.
        shards: the file of each of its matrices, by its name in the state dict.
        file: where changed matrices go, all of the layer's.
    """

    def __init__(self, prefix: str, shards: Mapping[str, Path], file: Path) -> None:
        self._prefix = prefix
        self._files = dict(shards)
        self._file = file
        self._users = 0
        self._loaded: dict[str, tuple[weakref.ref[nn.Parameter], int]] = {}

    @torch.inference_mode(False)
    def open(self, layer: nn.Module) -> None:
        """Read the layer's matrices, unless somebody has them open already.

        Raises:
            LarosaError: a file is gone or damaged.
        """
        if self._users == 0:
            for name, weight in self._matrices(layer).items():
                if name in self._files:  # else it is new, and still in memory
                    weight.data = read_weight(self._files[name], name, weight.dtype)
                self._loaded[name] = weakref.ref(weight), weight._version
        self._users += 1

    @torch.inference_mode(False)
    def close(self, layer: nn.Module) -> None:
        """Keep what has changed and let go of the matrices, unless somebody has them open still.

        Raises:
            LarosaError: the disk is full, or cannot be written to.
        """
        self._users -= 1
        if self._users == 0:
            if self._has_changed(layer):
                self._write(layer, self._file)
            self._loaded.clear()
            for weight in self._matrices(layer).values():
                weight.data = absent(weight.shape, weight.dtype)

    def hand_over(self, layer: nn.Module, file: Path) -> dict[str, int]:
        """Make the matrices a file of a checkpoint; the layer cannot be used any more.

        Returns:
            The bytes of each, by name.
        """
        if set(self._files.values()) == {self._file}:
            os.replace(self._file, file)
        else:
            self.open(layer)
            self._write(layer, file)
            self.close(layer)
        return {name: weight.nbytes for name, weight in self._matrices(layer).items()}

    def _matrices(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        named = layer.named_parameters(prefix=self._prefix)
        return {name: weight for name, weight in named if weight.dim() > 1}

    def _has_changed(self, layer: nn.Module) -> bool:
        """Whether a matrix has been written to since it was read, or another has taken its place."""
        found = self._matrices(layer)
        return found.keys() != self._files.keys() or any(
            same() is not found[name] or found[name]._version != version
            for name, (same, version) in self._loaded.items()
        )

    def _write(self, layer: nn.Module, file: Path) -> None:
        tensors = {name: weight.data.contiguous() for name, weight in self._matrices(layer).items()}
        unfinished = file.with_suffix(".new")
        try:
            save_file(tensors, unfinished, metadata={"format": "pt"})
            os.replace(unfinished, file)
        except (OSError, SafetensorError) as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise LarosaError(f"{file.parent}: cannot keep a layer of {size / 1e9:.2f} GB here ({error})") from error
        self._files = dict.fromkeys(tensors, file)


_LAYER_FILES: weakref.WeakKeyDictionary[nn.Module, LayerFile] = weakref.WeakKeyDictionary()


def keep_on_disk(layer: nn.Module, file: LayerFile) -> None:
    """Let a layer, whose matrices are `absent`, have them in a file from now on."""
    _LAYER_FILES[layer] = file


def layer_file(layer: nn.Module) -> LayerFile | None:
    """Where a layer's matrices are kept; None where that is the memory."""
    return _LAYER_FILES.get(layer)


def is_streamed(model: nn.Module) -> bool:
    """Whether a model's decoder layers are on disk."""
    return any(layer_file(module) is not None for module in model.modules())


@contextmanager
def in_memory(layer: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Have a layer's weights in memory meanwhile, on `device` if one is given; what is changed of them is kept.

    Whoever touches the matrices of a decoder layer in a conversion asks for it here.
    """
    file = layer_file(layer)
    if file is not None:
        file.open(layer)
    home = next(layer.parameters()).device
    try:
        if device is not None:
            layer.to(device)
        yield
    finally:
        layer.to(home)
        if file is not None:
            file.close(layer)


@contextmanager
def in_memory_as_they_run(model: nn.Module) -> Iterator[None]:
    """Let each layer that is on disk be in memory while the model runs it."""
    handles = []
    for module in model.modules():
        if (file := layer_file(module)) is not None:
            handles.append(module.register_forward_pre_hook(lambda layer, _inputs, file=file: file.open(layer)))
            handles.append(module.register_forward_hook(lambda layer, _inputs, _output, file=file: file.close(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parameters_in_memory(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by name, each in memory while it is looked at."""
    seen: set[str] = set()
    for prefix, module in model.named_modules():
        if layer_file(module) is not None:
            with in_memory(module):
                for name, weight in module.named_parameters(prefix=prefix):
                    seen.add(name)
                    yield name, weight
    yield from ((name, weight) for name, weight in model.named_parameters() if name not in seen)


def absent(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """What stands for a matrix that is not in memory: NaN, or zeros of whole numbers, without room for them."""
    nothing = float("nan") if dtype.is_floating_point else 0
    return torch.full((), nothing, dtype=dtype).expand(shape)


def read_weight(file: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of a safetensors file.

    Raises:
        LarosaError: the file is gone or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            # A copy: what is mapped would count beside it, and change with the file.
            return tensors.get_tensor(name).to(dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise LarosaError(f"{file}: '{name}' cannot be read ({error})") from error
