"""What a CUDA graph is to a GPU: operators recorded once and replayed without Python in between.

Between two operators that stream weights through the caches, interpreter and dispatcher start cold, which takes
longer than a small operator itself.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from larosa.ops.cpu.kernels import check_status
from larosa.ops.cpu.library import REPLAYED, load

_recording = threading.Lock()

_MOST_ARGUMENTS = 10  # LAROSA_MOST_ARGUMENTS


class Graph:
    """The operators that a function runs, and the memory that they run on.

    The function is run once. It must be made of operators of `torch.ops.larosa` alone, whose shapes do not depend on
    values, and give a tensor. Replaying reads its inputs from the memory they had then, whatever that holds now.

    Raises:
        RuntimeError: the function runs something that would not be replayed.
    """

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        #: PyTorch's threads, whose number was recorded too.
        self.threads = torch.get_num_threads()
        self._calls: list[bytes] = []
        self._kept: list[Any] = []
        self._thread = threading.get_ident()
        functions = vars(load())
        with _recording, _Keep() as keep:
            own = functions.copy()
            functions.update({name: self._recorder(name, own[name]) for name in REPLAYED})
            try:
                self.output = function()
            finally:
                functions.update(own)
        self._kept += keep.memory
        self._program = b"".join(self._calls)

    def _recorder(self, name: str, call: Callable[..., int | None]) -> Callable[..., int | None]:
        def record(*arguments: Any) -> int | None:
            if threading.get_ident() == self._thread:
                self._calls.append(_pack(name, arguments))
                self._kept.append(arguments)
            return call(*arguments)

        return record

    def replay(self) -> torch.Tensor:
        """Run the operators again; the result is in the same tensor each time."""
        check_status(load().replay(self._program, len(self._calls)))
        return self.output


def _pack(name: str, arguments: tuple[Any, ...]) -> bytes:
    """`larosa_call` of a function and what ctypes was given for it."""
    missing = _MOST_ARGUMENTS - len(arguments)
    kinds = "".join("d" if isinstance(value, float) else "q" for value in arguments)
    return struct.pack(f"=q{kinds}{8 * missing}x", REPLAYED.index(name), *map(_value, arguments))


def _value(argument: Any) -> int | float:
    """A number, or the address of what is passed by one; the argument has to be kept."""
    if argument is None:
        return 0
    if isinstance(argument, bytes):
        return ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value or 0
    if isinstance(argument, (int, float)):
        return argument
    return ctypes.addressof(argument._obj)  # ctypes.byref


class _Keep(TorchDispatchMode):
    """Keeps what operators read and write from being freed."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "larosa" or func is torch.ops.larosa.above.default:
            raise RuntimeError(f"{func} cannot be recorded")
        # Kernels run on a copy of an activation that is not in one piece, and the copy would be gone.
        if not all(value.is_contiguous() for value in args if isinstance(value, torch.Tensor)):
            raise RuntimeError(f"{func} of a tensor that is not contiguous cannot be recorded")
        result = func(*args, **(kwargs or {}))
        self.memory += [args, kwargs, result]
        return result
