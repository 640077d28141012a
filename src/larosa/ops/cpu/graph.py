"""What a CUDA graph is to a GPU: operators recorded once and replayed without Python in between.

Between two operators that stream weights through the caches, interpreter and dispatcher start cold, which takes
longer than a small operator itself.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from larosa.ops.cpu.kernels import check_status
from larosa.ops.cpu.library import REPLAYED, load

_recording = threading.Lock()

_MOST_ARGUMENTS = 11  # LAROSA_MOST_ARGUMENTS

#: A function of the library, and what ctypes was given for it.
_Call = tuple[str, tuple[Any, ...]]
#: An operator, its arguments, those by name, and its result.
_Operator = tuple[Any, tuple[Any, ...], dict[str, Any] | None, Any]


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
        self._calls: list[_Call] = []
        self._thread = threading.get_ident()
        functions = vars(load())
        with _recording, _Keep() as keep:
            own = functions.copy()
            functions.update({name: self._recorder(name, own[name]) for name in REPLAYED})
            try:
                self.output = function()
            finally:
                functions.update(own)
        self._kept = keep.operators
        for index in _postponable(keep.operators):
            name, arguments = self._calls[index]
            self._calls[index] = f"{name}_meanwhile", arguments
        self._program = b"".join(_pack(*call) for call in self._calls)

    def _recorder(self, name: str, call: Callable[..., int | None]) -> Callable[..., int | None]:
        def record(*arguments: Any) -> int | None:
            if threading.get_ident() == self._thread:
                self._calls.append((name, arguments))
            return call(*arguments)

        return record

    def replay(self) -> torch.Tensor:
        """Run the operators again; the result is in the same tensor each time."""
        check_status(load().replay(self._program, len(self._calls)))
        return self.output


def _postponable(operators: list[_Operator]) -> Iterator[int]:
    """Which operators are dense products that others follow before a product by columns adds their result.

    They can run beside those others, on threads that would wait there.
    """
    for index, (function, _, _, result) in enumerate(operators):
        if function in (torch.ops.larosa.linear.default, torch.ops.larosa.adapt.default):
            later = (at for at in range(index + 1, len(operators)) if _reads(operators[at], result))
            reader = next(later, index)
            if reader > index + 1 and _only_adds(operators[reader], result):
                yield index


def _reads(operator: _Operator, tensor: torch.Tensor) -> int:
    """How many of an operator's arguments are the tensor."""
    _, args, kwargs, _ = operator
    return sum(value is tensor for value in tree_leaves((args, kwargs)))


def _only_adds(operator: _Operator, tensor: torch.Tensor) -> bool:
    """Whether it is a product by columns with the tensor for its residual, and for nothing else."""
    function, args, _, _ = operator
    at = {torch.ops.larosa.sparse_linear.default: 4, torch.ops.larosa.low_bit_linear.default: 8}.get(function)
    return at is not None and len(args) > at and args[at] is tensor and _reads(operator, tensor) == 1


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
        self.operators: list[_Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "larosa":
            raise RuntimeError(f"{func} cannot be recorded")
        # Kernels run on a copy of an activation that is not in one piece, and the copy would be gone.
        if not all(value.is_contiguous() for value in args if isinstance(value, torch.Tensor)):
            raise RuntimeError(f"{func} of a tensor that is not contiguous cannot be recorded")
        result = func(*args, **(kwargs or {}))
        self.operators.append((func, args, kwargs, result))
        return result
