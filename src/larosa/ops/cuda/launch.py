"""Launching compiled kernels on PyTorch's current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from larosa.errors import LarosaError
from larosa.ops.cuda.compiler import compiled, missing

#: What a kernel takes: an int, a float, a tensor's address, or a structure.
Argument = ctypes.c_int | ctypes.c_uint | ctypes.c_longlong | ctypes.c_float | ctypes.c_void_p | ctypes.Structure

#: Of the memory that is divided into shared memory and the first cache. The same for all kernels: a multiprocessor is
#: divided anew only when it is empty, which takes 10 us.
_SHARED_PERCENT = 50


_early: ContextVar[bool] = ContextVar("early", default=False)
_waits: ContextVar[bool] = ContextVar("waits", default=False)


@contextmanager
def early_launches(early: bool = True) -> Iterator[None]:
    """Let the kernels launched in here, by this thread, begin before those in front of them have finished.

    They then read some operands early (see `kernels.py`). So it is for a fixed sequence of operators that is known to
    write none of those just before: the decode engine's step. Where they are not to be `early`, kernels wait again.
    """
    token = _early.set(early)
    try:
        yield
    finally:
        _early.reset(token)


def next_launch_waits() -> None:
    """Let the next kernel begin only once all before it have finished, behind what somebody else has launched.

    What that has written stands in no kernel's list of what may not be read early.
    """
    _waits.set(True)


@dataclass(frozen=True)
class Machine:
    """What the kernels want to know of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes a block can have

    @property
    def architecture(self) -> str:
        """As the compiler calls it."""
        return "sm_{}{}".format(*self.capability)

    @property
    def overlaps(self) -> bool:
        """Has clusters of blocks, and can launch kernels before those they depend on have finished."""
        return self.capability >= (9, 0)


@dataclass(frozen=True)
class Grid:
    """How many blocks of how many threads; `cluster` neighbouring blocks along x run together."""

    x: int
    y: int
    threads: int
    cluster: int = 1


@cache
def machine(device: torch.device) -> Machine:
    """The GPU behind a device.

    Raises:
        LarosaError: it is too old, or not NVIDIA's.
    """
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip or (properties.major, properties.minor) < (8, 0):
        raise LarosaError(
            f"the CUDA kernels need an NVIDIA GPU of compute capability 8.0 or newer, {properties.name} is not: "
            "set LAROSA_CUDA_KERNELS=triton"
        )
    driver = _driver()
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    shared_memory = _checked(driver.cuDeviceGetAttribute(attribute, device.index))
    return Machine((properties.major, properties.minor), properties.multi_processor_count, shared_memory)


def launch(
    device: torch.device,
    source: str,
    kernel: str,
    macros: Mapping[str, str],
    grid: Grid,
    arguments: Sequence[Argument],
) -> None:
    """Launch a kernel of a file in `source/` on the device's current stream.

    Raises:
        LarosaError: a block needs more shared memory than the GPU has; see also `compiled` and `machine`.
    """
    with torch.cuda.device(device):
        loaded = _load(device, source, kernel, tuple(sorted(macros.items())))
        gpu, stream = machine(device), torch.cuda.current_stream().cuda_stream
        _start(_configuration(gpu, grid, loaded.shared, stream), loaded, arguments)
        _waits.set(False)


def run(
    x: torch.Tensor, source: str, kernel: str, macros: Mapping[str, str], grid: Grid, arguments: Sequence[Argument]
) -> None:
    """The same on the device of x; nothing where the grid is empty."""
    if grid.x and grid.y:
        launch(x.device, source, kernel, macros, grid, arguments)


@dataclass(frozen=True)
class _Loaded:
    function: Any
    shared: int


@cache
def _load(device: torch.device, source: str, kernel: str, macros: tuple[tuple[str, str], ...]) -> _Loaded:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel} {dict(macros)} is first used while a graph is captured: run what is captured once"
        )
    driver, gpu = _driver(), machine(device)
    module = _checked(driver.cuModuleLoadData(compiled(source, dict(macros), gpu.architecture)))
    function = _checked(driver.cuModuleGetFunction(module, kernel.encode()))
    address, size = _checked(driver.cuModuleGetGlobal(module, b"shared_bytes"))
    shared = ctypes.c_uint()
    _checked(driver.cuMemcpyDtoH(ctypes.addressof(shared), address, size))
    if shared.value > gpu.shared_memory:
        raise LarosaError(
            f"{kernel} needs {shared.value} bytes of shared memory for this size, the GPU has {gpu.shared_memory}: "
            "set LAROSA_CUDA_KERNELS=triton"
        )
    attributes = driver.CUfunction_attribute
    for attribute, value in (
        (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared.value),
        (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, _SHARED_PERCENT),
    ):
        _checked(driver.cuFuncSetAttribute(function, attribute, value))
    return _Loaded(function, shared.value)


def _configuration(gpu: Machine, grid: Grid, shared: int, stream: int) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid.x, grid.y, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = grid.threads, 1, 1
    config.sharedMemBytes = shared
    config.hStream = stream
    attributes = []
    if gpu.overlaps and _early.get() and not _waits.get():
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    if grid.cluster > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = grid.cluster, 1, 1
        attributes.append(cluster)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def _start(config: Any, loaded: _Loaded, arguments: Sequence[Argument]) -> None:
    addresses = addresses_of(arguments)
    _checked(_driver().cuLaunchKernelEx(config, loaded.function, ctypes.addressof(addresses), 0))


def addresses_of(arguments: Sequence[Argument]) -> ctypes.Array[ctypes.c_void_p]:
    """The array of pointers to arguments that a launch takes; it keeps none of them alive."""
    return (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))


@cache
def _driver() -> ModuleType:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise missing("cuda-bindings", error) from error
    return driver


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status.value != 0:
        _, text = _driver().cuGetErrorString(status)
        raise RuntimeError(f"{status.name} from the CUDA driver: {text.decode()}")
    return values[0] if len(values) == 1 else tuple(values)
