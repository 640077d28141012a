"""How the library is chosen, set up and missed."""

import ctypes
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from larosa.errors import LarosaError
from larosa.ops import cpu
from larosa.ops.cpu import library

from .cases import ISAS

SOURCES = Path(library.__file__).parent / "csrc"


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The state before an operator's first call, when the environment and the library are looked at."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses_the_instruction_set(unloaded, monkeypatch, isa):
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    assert torch.ops.larosa.top_k(torch.tensor([[1.0, -3.0, 2.0]]), 2)[1].tolist() == [[1, 2]]
    assert library.isa() == isa


def test_an_unknown_instruction_set_is_an_error(unloaded, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, "sse9")
    with pytest.raises(LarosaError, match="LAROSA_CPU_ISA 'sse9' is not known: use one of portable, avx2, avxvnni, "):
        torch.ops.larosa.silu_mul(torch.zeros(1, 4))


def test_an_instruction_set_that_cannot_be_had_is_an_error():
    for isa in set(library.ISAS) - set(ISAS):
        with pytest.raises(LarosaError, match=f"'{isa}' is not supported by this processor"):
            library.set_isa(isa)


def test_the_widest_instruction_set_is_the_default():
    """In a process that has not chosen one, nor imports larosa, which takes seconds."""
    program = (
        "import ctypes, sys; isa = ctypes.CDLL(sys.argv[1]).larosa_isa; isa.restype = ctypes.c_char_p; print(isa())"
    )
    command = [sys.executable, "-c", program, library._find()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == repr(ISAS[-1].encode())


def test_without_the_library_an_operator_says_how_to_get_it(unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    with pytest.raises(LarosaError, match="installed without its CPU kernels: install a C\\+\\+ compiler"):
        torch.ops.larosa.silu_mul(torch.zeros(1, 4))


@pytest.mark.parametrize(
    "text", ["int other;", "extern long larosa_interface(void); long larosa_interface(void) { return 0; }"]
)
def test_a_library_of_another_version_is_refused_before_it_is_called(unloaded, monkeypatch, tmp_path, text):
    (tmp_path / "old.c").write_text(text)
    stale = tmp_path / library._NAMES[0]
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", stale, tmp_path / "old.c"], check=True)
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    with pytest.raises(LarosaError) as refused:
        torch.ops.larosa.silu_mul(torch.zeros(1, 4))
    assert str(refused.value) == (
        f"{stale} was built from another version of larosa: install larosa once more "
        "(in a clone: pip install -e . --no-deps)"
    )


def declarations() -> str:
    """larosa_cpu.h without its comments."""
    return " ".join(re.sub(r"/\*.*?\*/", "", (SOURCES / "larosa_cpu.h").read_text(), flags=re.DOTALL).split())


def test_another_header_has_another_number():
    number = int(re.search(r"LAROSA_INTERFACE = (\d+)", declarations())[1])
    assert number == library.INTERFACE == library.load().interface()
    # Whoever changes a declaration counts LAROSA_INTERFACE and INTERFACE up, and notes here what the header is now.
    digest = hashlib.sha256(declarations().encode()).hexdigest()[:16]
    assert (number, digest) == (6, "a6fe90f3481419ef")


def test_signatures_are_those_of_the_header():
    kinds = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "double": ctypes.c_double, "float": ctypes.c_float}
    pointers = {ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(library.Attention)}
    found = {}
    for name, listed in re.findall(r"larosa_(\w+)\(([^)]*)\);", declarations()):
        arguments = [] if listed == "void" else listed.split(", ")
        found[name] = [None if "*" in text else kinds[text.split()[0]] for text in arguments]
    assert found.keys() == library._SIGNATURES.keys()
    for name, (_, arguments) in library._SIGNATURES.items():
        assert [None if kind in pointers else kind for kind in arguments] == found[name], name


def test_threads_of_pytorch_are_shared_where_it_has_openmp():
    has_openmp = "OpenMP" in torch.__config__.parallel_info().partition("backend:")[2]
    assert library.threads() == ("openmp" if has_openmp and sys.platform == "linux" else "own")
