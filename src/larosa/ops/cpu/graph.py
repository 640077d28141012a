"""What a CUDA graph is to a GPU: operators recorded once and replayed without PyTorch in between.

Between two operators that stream weights through the caches, interpreter and dispatcher start cold, which takes
longer than a small operator itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from larosa.ops.cpu.kernels import check_status
from larosa.ops.cpu.library import load

_recording = threading.Lock()


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
        self._calls: list[tuple[Callable[..., int | None], tuple[Any, ...]]] = []
        self._thread = threading.get_ident()
        functions = vars(load())
        with _recording, _Keep() as keep:
            own = functions.copy()
            functions.update({name: self._recorder(call) for name, call in own.items()})
            try:
                self.output = function()
            finally:
                functions.update(own)
        self._kept = keep.memory

    def _recorder(self, call: Callable[..., int | None]) -> Callable[..., int | None]:
        def record(*arguments: Any) -> int | None:
            if threading.get_ident() == self._thread:
                self._calls.append((call, arguments))
            return call(*arguments)

        return record

    def replay(self) -> torch.Tensor:
        """Run the operators again; the result is in the same tensor each time."""
        for call, arguments in self._calls:
            status = call(*arguments)
            if status:
                check_status(status)
        return self.output


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
