"""The kernels of a GPU, on one where there is one, and without: CUDA C++ in the emulator, Triton in its interpreter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from larosa.ops.cuda import kernels as cuda_kernels
from larosa.ops.cuda import launch as cuda_launch
from larosa.ops.cuda import top_k_linear
from larosa.ops.cuda.launch import Machine

from .cases import Target
from .emulator import Emulator

#: As many multiprocessors as make the plans use clusters of every size on the small cases of the tests.
SMALL_H200 = Machine(capability=(9, 0), multiprocessors=8, shared_memory=227 * 1024)


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled kernels that the next run finds again: under a digest of all that they are made of."""
    provider = getattr(pytestconfig, "cache", None)  # not with `-p no:cacheprovider`
    return Path(provider.mkdir("kernels") if provider else tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def emulator(compiled: Path) -> Emulator:
    if not shutil.which("g++"):
        pytest.skip("the emulator of CUDA kernels is compiled by g++")
    (compiled / "emulator").mkdir(exist_ok=True)
    return Emulator(compiled / "emulator", SMALL_H200)


@pytest.fixture(
    scope="session",
    params=[
        "emulated cuda",
        "interpreted triton",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ],
)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The operators of one set of kernels, and where their tensors live."""
    name = request.param
    if name == "emulated cuda":
        emulator: Emulator = request.getfixturevalue("emulator")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_launch, "launch", emulator.launch)
            patch.setattr(cuda_launch, "machine", emulator.machine)
            yield Target(cuda_kernels, torch.device("cpu"))
        return
    if name == "cuda":
        yield Target(cuda_kernels, torch.device("cuda"))
        return
    if name == "interpreted triton" and torch.cuda.is_available():
        pytest.skip("Triton interprets or compiles, one of the two in a process")
    interpreted = name == "interpreted triton"
    yield Target(_triton_kernels(), torch.device("cpu" if interpreted else "cuda"), truncates=interpreted)


def _triton_kernels() -> Any:
    pytest.importorskip("triton")
    from larosa.ops.triton import kernels

    return kernels


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first case of each test stands for its others in Triton's interpreter, which takes seconds for many.

    Of a test marked `slow_in_triton` none does: another test runs the same kernels there in less time.
    """
    seen = set()
    for item in items:
        given = getattr(item, "callspec", None)
        if given is None or given.params.get("target") != "interpreted triton":
            continue
        test = item.location[0], item.originalname
        if test in seen or item.get_closest_marker("slow_in_triton"):
            item.add_marker(pytest.mark.slow)
        seen.add(test)


@pytest.fixture
def selects_from_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has one block select for all from short vectors too, which only takes longer than another kernel would."""
    monkeypatch.setattr(top_k_linear, "_CUT", (0, 16384))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled kernels."""
    monkeypatch.setenv("LAROSA_CACHE", str(tmp_path))
    return tmp_path / "cuda"
