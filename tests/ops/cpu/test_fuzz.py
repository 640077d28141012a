"""The kernels' stand-alone test program: under the sanitizers, and its results bit by bit on other processors."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .cases import ISAS
from .test_library import SOURCES

pytestmark = pytest.mark.slow

CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CASES = 800

#: Of each instruction set: what its cases are, and digests of their results.
Digests = dict[str, list[tuple[str, str]]]


def build(folder: Path, *settings: str) -> str:
    """The program. AVX-VNNI is encoded as AVX-512 has it where the processor has no other."""
    cmake = [sys.executable, "-m", "cmake"]
    source = Path(__file__).parent / "fuzz.cpp"
    settings += ("-DLAROSA_FUZZ=ON", f"-DLAROSA_FUZZ_SOURCE={source}")
    if "avxvnni" not in ISAS:
        settings += ("-DLAROSA_AVXVNNI_BY_AVX512=ON",)
    subprocess.run([*cmake, "-S", str(SOURCES), "-B", str(folder), *settings], check=True)
    subprocess.run([*cmake, "--build", str(folder), "--parallel", "2"], check=True)
    return str(folder / "larosa_cpu_fuzz")


def digests(*program: str) -> Digests:
    """What it prints: a third of the cases have NaN and infinities in them."""
    command = [*program, str(CASES), "1", "digests"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: Digests = {}
    for line in output.splitlines()[:-1]:
        isa, case = line.split(" ", 1)
        what, digest = case.rsplit(" ", 1)
        found.setdefault(isa, []).append((what, digest))
    assert all(len(cases) == CASES for cases in found.values())
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Digests:
    """Of this processor. Its portable kernels multiply and add at once too, where it can."""
    flags = ["-DCMAKE_CXX_FLAGS=-mfma"] if "avx2" in ISAS else []
    return digests(build(tmp_path_factory.mktemp("here"), *flags))


@pytest.fixture(scope="module")
def for_arm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program, built for 64-bit Arm."""
    return build(
        tmp_path_factory.mktemp("arm"),
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )


def test_no_call_reads_or_writes_outside_or_does_what_is_undefined(tmp_path):
    """3,000 random calls an instruction set, against double precision, on threads of the library's own."""
    fuzz = build(tmp_path, "-DLAROSA_SANITIZERS=address,undefined")
    result = subprocess.run([fuzz, "3000", "1"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[0]) >= 3000 * len(ISAS)


def test_few_bits_and_selections_are_the_same_on_every_instruction_set(here):
    assert here.keys() >= set(ISAS)
    for cases in here.values():
        same = [
            (case, expected)
            for case, expected in zip(cases, here["portable"], strict=True)
            if case[0].startswith(("low_bit_linear", "top_k"))
        ]
        assert len(same) == CASES // 4
        assert all(case == expected for case, expected in same)
    if "avxvnni" in here:  # by other instructions, but as many lanes
        assert here["avxvnni"] == here["avx2"]


@pytest.mark.skipif(shutil.which(CROSS_COMPILER) is None, reason=f"needs {CROSS_COMPILER}")
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR}")
@pytest.mark.skipif(platform.machine() != "x86_64" or "avx2" not in ISAS, reason="compares with x86-64 and its FMA")
@pytest.mark.parametrize(
    ("processor", "isas"), [("max", ["neondotprod", "neon", "portable"]), ("cortex-a72", ["neon", "portable"])]
)
def test_arm_gives_the_bits_of_four_lanes_of_x86(here, for_arm, processor, isas):
    """Those of few bits and of selections are every instruction set's; a Cortex-A72 has no dot products."""
    found = digests(EMULATOR, "-cpu", processor, for_arm)
    assert sorted(found) == sorted(isas)
    for isa in isas:
        differ = [case for case, other in zip(found[isa], here["portable"], strict=True) if case != other]
        assert not differ, isa
