"""All decoder layers of one token in one launch, by `source/stack.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p
from typing import TYPE_CHECKING, cast

import torch

from larosa.ops.cuda import launch
from larosa.ops.cuda.launch import Argument, Grid
from larosa.ops.cuda.parameters import TYPE_NAMES, Matrices, Vector

if TYPE_CHECKING:
    from larosa.decoding.layers import DecodeLayer, Norm, Site

THREADS = 512  # of a block, in stack.cu
_WIDEST = 2**15  # entries of a vector, whose indices are kept in 16 bits
_MOST_HEADS = 4  # that a block attends with at once: more do not fit its registers
_PIECE = 16  # bytes that are read at once


class _Site(ctypes.Structure):
    _fields_ = (
        ("matrices", Matrices),
        ("score", Vector),
        ("adapter", c_void_p),
        ("k", ctypes.c_longlong),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((site, _Site) for site in ("h1", "h2", "h3", "h4")),
        *((name, Vector) for name in ("h1_gain", "h3_gain")),
        ("keys", c_void_p),
        ("values", c_void_p),
        *((name, Vector) for name in ("q_gain", "k_gain")),
        *((name, ctypes.c_float) for name in ("h1_eps", "h3_eps", "head_eps", "scale")),
        *((name, ctypes.c_int) for name in ("window", "rotates")),
        ("unused", ctypes.c_longlong),
    )


class _Sizes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("hidden", "inner", "query_heads", "key_heads", "length", "layers")
    )


class _Exchange(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p) for name in ("hidden", "middle", "qkv", "attended", "inner", "partials", "teams", "arrived")
    )


class Stack:
    """The layers of a model that is decoded one token at a time.

    Args:
        layers: with weights and adapters column-major, all on one GPU, for which `obstacle` found none.
        tables: cos and sin [T, d] of the rotary embedding, T being the cache's length.
    """

    def __init__(self, layers: Sequence[DecodeLayer], tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        first = layers[0]
        self._layers, self._tables = layers, tables  # whose memory the kernel reads
        self._device = first.attention.keys.device
        key_heads, _, size = first.attention.keys.shape
        self._sizes = _sizes(layers)
        self._grid = Grid(launch.machine(self._device).multiprocessors, 1, THREADS, together=True)
        self._macros = _macros(first)
        self._vectors: list[torch.Tensor] = []
        packed = bytes((_Layer * len(layers))(*map(self._layer, layers)))
        self._packed = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self._device)
        heads, hidden, inner = self._sizes.query_heads, self._sizes.hidden, self._sizes.inner
        widths = hidden, (heads + 2 * key_heads) * size, heads * size, inner, self._grid.x * _MOST_HEADS * (size + 2)
        self._buffers = [torch.zeros(width, device=self._device) for width in widths]
        self._counters = torch.zeros(heads + 1, dtype=torch.int32, device=self._device)

    def __call__(self, hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The residual stream [1, D] float32 after all layers, in place.

        Args:
            hidden: what goes into the first layer, contiguous.
            position: [1] int64, where the token stands; outside the cache it gives NaN and stores nothing.
        """
        if hidden.dtype != torch.float32 or not hidden.is_contiguous() or hidden.numel() != self._sizes.hidden:
            raise ValueError(f"hidden must be contiguous float32 of {self._sizes.hidden} entries")
        counters = self._counters.data_ptr()
        buffers = (buffer.data_ptr() for buffer in self._buffers)
        exchange = _Exchange(hidden.data_ptr(), *buffers, counters + 4, counters)
        addresses = (c_void_p(tensor.data_ptr()) for tensor in (position, *self._tables))
        arguments: list[Argument] = [c_void_p(self._packed.data_ptr()), self._sizes, exchange, *addresses]
        launch.launch(self._device, "stack.cu", "stack", self._macros, self._grid, arguments)
        return hidden

    def _layer(self, layer: DecodeLayer) -> _Layer:
        attention, hidden = layer.attention, layer.h1.weights[0].shape[1]
        size = attention.keys.shape[2]
        first, second = (cast("Norm", site.source) for site in (layer.h1, layer.h3))
        return _Layer(
            self._site(layer.h1),
            self._site(layer.h2, layer.attention_adapter),
            self._site(layer.h3),
            self._site(layer.h4, layer.residual_adapter),
            *(self._vector("gain", norm.gain, hidden) for norm in (first, second)),
            attention.keys.data_ptr(),
            attention.values.data_ptr(),
            *(self._vector("gain", gain, size) for gain in (attention.q_gain, attention.k_gain)),
            *(first.eps, second.eps, attention.eps, attention.scale),
            *(attention.window, attention.cos is not None),
        )

    def _site(self, site: Site, adapter: torch.Tensor | None = None) -> _Site:
        piece = _PIECE // site.weights[0].element_size()
        biases = [self._float(bias) for bias in site.biases]
        matrices, _ = Matrices.of(site.weights, biases, piece, along=1)
        width = site.weights[0].shape[1]
        k = width if site.k is None else site.k
        return _Site(matrices, self._vector("score", site.score, width), _address(adapter), k)

    def _vector(self, name: str, tensor: torch.Tensor | None, size: int) -> Vector:
        return Vector.of(name, self._float(tensor), size)

    def _float(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """In the one format of the kernel, which saves it code, and held as long as it may run."""
        if tensor is None:
            return None
        self._vectors.append(tensor.float())
        return self._vectors[-1]


def obstacle(layers: Sequence[DecodeLayer]) -> str | None:
    """Why the layers cannot run in one launch, which is a matter of their sizes; None where they can."""
    first = layers[0]
    weights = [weight for layer in layers for site in _sites(layer) for weight in site.weights]
    adapters = [a for layer in layers for a in (layer.attention_adapter, layer.residual_adapter) if a is not None]
    dtype, piece = weights[0].dtype, _PIECE // weights[0].element_size()
    size = first.attention.keys.shape[2]
    if any(layer.compares for layer in layers):
        return "a site compares with a threshold"
    if any(matrix.dtype != dtype for matrix in (*weights, *adapters, first.attention.keys)):
        return "weights or cache in several formats"
    if any(_shapes(layer) != _shapes(first) for layer in layers):
        return "layers of several shapes"
    if size % piece or size % 2 or size // piece > 32 or any(len(matrix) % piece for matrix in (*weights, *adapters)):
        return "outputs that are no whole pieces of 16 bytes"
    if any(matrix.data_ptr() % _PIECE for matrix in (*weights, *adapters)):
        return "weights that do not start at a multiple of 16 bytes"
    if any(matrix.numel() >= 2**32 for matrix in weights) or max(_widths(first)) > _WIDEST:
        return f"a vector of more than {_WIDEST} entries"
    device = first.attention.keys.device
    needed = launch.shared_memory(device, "stack.cu", "stack", _macros(first))
    there = launch.machine(device).shared_memory
    return f"{needed} bytes of shared memory, of which there are {there}" if needed > there else None


def _sites(layer: DecodeLayer) -> tuple[Site, Site, Site, Site]:
    return layer.h1, layer.h2, layer.h3, layer.h4


def _shapes(layer: DecodeLayer) -> list[torch.Size]:
    return [weight.shape for site in _sites(layer) for weight in site.weights]


def _widths(layer: DecodeLayer) -> tuple[int, int, int]:
    """Entries of the residual stream, of all heads together, and inside the MLP."""
    hidden, heads, inner = (site.weights[0].shape[1] for site in (layer.h1, layer.h2, layer.h4))
    return hidden, heads, inner


def _sizes(layers: Sequence[DecodeLayer]) -> _Sizes:
    hidden, heads, inner = _widths(layers[0])
    key_heads, length, size = layers[0].attention.keys.shape
    return _Sizes(hidden, inner, heads // size, key_heads, length, len(layers))


def _macros(layer: DecodeLayer) -> dict[str, str]:
    sizes = _sizes([layer])
    group = sizes.query_heads // sizes.key_heads
    together = max(heads for heads in range(1, min(group, _MOST_HEADS) + 1) if group % heads == 0)
    kind = TYPE_NAMES[layer.h1.weights[0].dtype]
    return {
        "WEIGHT": kind,
        "CACHE": kind,
        "SIZE": str(layer.attention.keys.shape[2]),
        "HEADS": str(together),
        "HIDDEN": str(sizes.hidden),
        "WIDEST": str(max(_widths(layer))),
    }


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
