"""Compilation by NVRTC, its cache on disk, and what is said where something is missing."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from larosa.errors import LarosaError
from larosa.ops import backend
from larosa.ops.cuda import compiler, launch

KERNELS = (
    *(
        (
            "sparse_linear.cu",
            {
                "WEIGHT": weight,
                "LANES": lanes,
                "CLUSTER": cluster,
                "SWIGLU": "false",
                "ROWS": "1",
                "COLUMNS_EACH": "1",
                **flags,
            },
        )
        for weight, lanes, cluster, flags in (
            ("Half", "32", "8", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "false"}),
            ("Half", "8", "2", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "true"}),
            ("Half", "8", "2", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "true", "SCALE": "Half"}),
            ("BFloat16", "16", "1", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "false", "SCALE": "float"}),
            ("BFloat16", "16", "4", {"ALIGNED": "true", "ADAPTER": "false", "ALONE": "false"}),
            ("float", "4", "1", {"ALIGNED": "false", "ADAPTER": "true", "ALONE": "false"}),
            ("float", "8", "2", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "true", "SCALE": "float"}),
            ("float", "4", "1", {"ALIGNED": "false", "ADAPTER": "true", "ALONE": "false", "SCALE": "BFloat16"}),
            ("BFloat16", "16", "4", {"ALIGNED": "true", "ADAPTER": "false", "ALONE": "false", "ROWS": "8"}),
            ("Half", "8", "2", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "true", "SCALE": "Half", "ROWS": "3"}),
        )
    ),
    *(
        (
            "sparse_linear.cu",
            {
                **{"WEIGHT": weight, "LANES": lanes, "CLUSTER": cluster, "SWIGLU": "false", "LOADS": "5"},
                **{"ROWS": "1", "COLUMNS_EACH": "1", **flags},
            },
        )
        for weight, lanes, cluster, flags in (
            ("Int4", "14", "2", {"ALIGNED": "true", "ADAPTER": "false", "ALONE": "false"}),
            ("Int8", "32", "1", {"ALIGNED": "false", "ADAPTER": "false", "ALONE": "false"}),
            ("Int4", "8", "8", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "true", "SCALE": "BFloat16"}),
            ("Int8", "16", "8", {"ALIGNED": "true", "ADAPTER": "true", "ALONE": "true", "CARRIED": "Half"}),
            ("Int4", "14", "2", {"ALIGNED": "true", "ADAPTER": "false", "ALONE": "false", "ROWS": "2"}),
            ("Int8", "32", "1", {"ALIGNED": "false", "ADAPTER": "false", "ALONE": "false", "ROWS": "4"}),
            ("Int4", "14", "2", {"ALIGNED": "true", "ADAPTER": "false", "ALONE": "false", "COLUMNS_EACH": "2"}),
        )
    ),
    *(
        (
            source,
            {
                **{"SOURCE": "NORMED", "EACH": "8", "FILLED": "true", "GAIN": "BFloat16", "SCORE": "None"},
                **{"WEIGHT": weight, "LANES": lanes, "CLUSTER": "2", "ALIGNED": "true", "SWIGLU": "true"},
                **{"MOST_KEPT": "2048", "ADAPTER": "false", "ALONE": "true", "COLUMNS_EACH": each},
            },
        )
        for source, each in (("top_k_linear.cu", "1"), ("above_linear.cu", "1"), ("above_linear.cu", "2"))
        for weight, lanes in (("Int4", "14"), ("Int8", "28"))
    ),
    *(
        ("linear.cu", {"WEIGHT": weight, "ALIGNED": "true", "ROWS": rows, "CHUNK": chunk})
        for weight, rows, chunk in (
            ("Half", "1", "8192"),
            ("BFloat16", "1", "8192"),
            ("float", "1", "8192"),
            ("BFloat16", "8", "4096"),
        )
    ),
    *(
        (
            "select.cu",
            {
                **{"SOURCE": source, "BLOCK": "1024", "EARLY": early},
                **{"EACH": each, "FILLED": "true", "GAIN": gain, "SCORE": score},
            },
        )
        for source, early, each, gain, score in (
            ("AS_IS", "false", "4", "None", "float"),
            ("AS_IS", "true", "11", "None", "float"),
            ("GATED", "false", "11", "None", "None"),
            ("NORMED", "false", "8", "Half", "float"),
            ("NORMED", "false", "32", "BFloat16", "Half"),
        )
    ),
    *(
        (
            "top_k_linear.cu",
            {
                **{"SOURCE": source, "EACH": each, "FILLED": "true", "GAIN": gain, "SCORE": "float"},
                "MOST_KEPT": "2048",
                **{"WEIGHT": weight, "LANES": lanes, "CLUSTER": cluster, "ALIGNED": "true"},
                "SWIGLU": swiglu,
            },
        )
        for source, each, gain, weight, lanes, cluster, swiglu in (
            ("NORMED", "8", "Half", "Half", "16", "1", "false"),
            ("NORMED", "8", "Half", "Half", "44", "2", "true"),
            ("AS_IS", "8", "None", "BFloat16", "8", "2", "false"),
            ("NORMED", "16", "float", "float", "32", "1", "false"),
        )
    ),
    *(
        (
            "top_k_linear_cut.cu",
            {
                **{"SOURCE": "AS_IS", "EACH": each, "FILLED": filled, "GAIN": "None", "SCORE": "float"},
                **{"WEIGHT": weight, "LANES": "8", "CLUSTER": "2", "ALIGNED": "true", "SWIGLU": "false"},
                **{"ALONE": "true", **format_},
            },
        )
        for each, filled, weight, format_ in (
            ("22", "false", "Half", {"SCALE": "Half"}),
            ("28", "true", "BFloat16", {"SCALE": "BFloat16"}),
            ("22", "false", "float", {}),
        )
    ),
    *(
        (
            "above.cu",
            {
                **{"SOURCE": source, "BLOCK": "1024", "EARLY": early},
                **{"EACH": each, "FILLED": filled, "GAIN": gain, "SCORE": score, "COLUMNS_EACH": columns},
            },
        )
        for source, early, each, filled, gain, score, columns in (
            ("AS_IS", "true", "11", "false", "None", "float", "1"),
            ("GATED", "false", "19", "false", "None", "Half", "1"),
            ("NORMED", "false", "4", "true", "Half", "None", "1"),
            ("AS_IS", "false", "10", "false", "None", "BFloat16", "2"),
            ("GATED", "false", "28", "true", "None", "float", "3"),
        )
    ),
    *(
        (
            "above_linear.cu",
            {
                **{"SOURCE": source, "EACH": each, "FILLED": "true", "GAIN": gain, "SCORE": "float"},
                **{"WEIGHT": weight, "LANES": lanes, "CLUSTER": cluster, "ALIGNED": "true"},
                **{"SWIGLU": swiglu, "ALONE": "true", "ADAPTER": adapter, "COLUMNS_EACH": "1", **format_},
            },
        )
        for source, each, gain, weight, lanes, cluster, swiglu, adapter, format_ in (
            ("NORMED", "8", "Half", "Half", "16", "1", "false", "false", {}),
            ("NORMED", "16", "float", "BFloat16", "44", "2", "true", "false", {}),
            ("AS_IS", "22", "None", "Half", "8", "2", "false", "false", {}),
            ("AS_IS", "28", "None", "BFloat16", "8", "2", "false", "true", {"SCALE": "BFloat16"}),
            ("AS_IS", "8", "None", "float", "8", "2", "false", "true", {}),
            ("AS_IS", "28", "None", "Int4", "14", "4", "false", "true", {"SCALE": "float", "COLUMNS_EACH": "2"}),
            ("AS_IS", "16", "None", "Int4", "14", "4", "false", "true", {"CARRIED": "Half", "COLUMNS_EACH": "2"}),
            ("NORMED", "16", "Half", "Int4", "14", "2", "false", "false", {"COLUMNS_EACH": "2"}),
        )
    ),
    ("greedy.cu", {"CLUSTER": "8"}),
    ("elementwise.cu", {}),
    *(
        (
            "attend.cu",
            {"CACHE": cache, "SIZE": size, "HEADS": heads, "CLUSTER": cluster, "THREADS": "128", "ROWS": rows},
        )
        for cache, size, heads, cluster, rows in (
            ("Half", "128", "4", "8", "1"),
            ("float", "80", "1", "1", "1"),
            ("Half", "128", "4", "8", "8"),
        )
    ),
)


@pytest.fixture(autouse=True)
def needs_nvrtc() -> None:
    try:
        compiler._version()
    except LarosaError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("source", "macros"), KERNELS)
def test_every_kernel_compiles_for_every_generation(compiled, monkeypatch, architecture, source, macros):
    monkeypatch.setenv("LAROSA_CACHE", str(compiled))
    if architecture == "sm_80":
        macros = {name: "1" if name == "CLUSTER" else text for name, text in macros.items()}
    assert compiler.compiled(source, macros, architecture).startswith(b"\x7fELF")


def test_what_was_compiled_is_kept(cache, monkeypatch):
    code = compiler.compiled("elementwise.cu", {}, "sm_90")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(compiler, "_compile", None)
    assert compiler.compiled("elementwise.cu", {}, "sm_90") == code


def test_other_options_sources_and_compilers_are_kept_apart(cache, monkeypatch):
    compiler.compiled("elementwise.cu", {}, "sm_90")
    compiler.compiled("elementwise.cu", {}, "sm_80")
    compiler.compiled("elementwise.cu", {"UNUSED": "1"}, "sm_90")
    texts = compiler._texts()
    monkeypatch.setattr(compiler, "_texts", lambda: texts | {"values.cuh": texts["values.cuh"] + "// changed\n"})
    compiler.compiled("elementwise.cu", {}, "sm_90")
    monkeypatch.setattr(compiler, "_version", lambda: "99.0")
    compiler.compiled("elementwise.cu", {}, "sm_90")
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"!" + data[41:]]
)
def test_a_damaged_file_is_compiled_again(cache, damage):
    code = compiler.compiled("elementwise.cu", {}, "sm_90")
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert compiler.compiled("elementwise.cu", {}, "sm_90") == code
    assert compiler._read(file) == code


@pytest.mark.slow
def test_several_may_fill_the_cache_at_once(cache):
    script = "from larosa.ops.cuda.compiler import compiled; print(len(compiled('elementwise.cu', {}, 'sm_90')))"
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sizes = {process.communicate(timeout=300)[0] for process in processes}
    assert len(sizes) == 1
    (file,) = cache.iterdir()
    assert compiler._read(file) is not None


def test_readers_never_see_half_a_file(cache):
    path, done = cache / "x.cubin", threading.Event()
    code = bytes(range(256)) * 4096
    compiler._write(path, code)

    def write() -> None:
        for _ in range(50):
            compiler._write(path, code)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert compiler._read(path) == code
    writer.join()


def test_what_was_not_used_for_longest_goes(cache, monkeypatch):
    """Room for two files: the older one that was read since outlasts the other, and what an ended process left."""
    monkeypatch.setattr(compiler, "_MOST_BYTES", 2500)
    cache.mkdir()
    (cache / "tmpabc").write_bytes(bytes(1000))
    os.utime(cache / "tmpabc", (0, 0))
    for age, name in enumerate(("a.cubin", "b.cubin")):
        compiler._write(cache / name, bytes(1000))
        os.utime(cache / name, (age, age))
    assert compiler._read(cache / "a.cubin") is not None
    compiler._write(cache / "c.cubin", bytes(1000))
    assert {path.name for path in cache.iterdir()} == {"a.cubin", "c.cubin"}


def test_a_folder_that_cannot_be_written_is_said_and_does_not_matter(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("LAROSA_CACHE", str(file))
    with pytest.warns(UserWarning, match="cannot be kept in .*set LAROSA_CACHE"):
        assert compiler.compiled("elementwise.cu", {}, "sm_90").startswith(b"\x7fELF")


def test_architectures_that_the_compiler_does_not_know(cache):
    with pytest.raises(LarosaError, match=r"does not compile for sm_30 .* LAROSA_CUDA_KERNELS=triton"):
        compiler.compiled("elementwise.cu", {}, "sm_30")


def test_a_source_that_does_not_compile_says_why(cache):
    with pytest.raises(RuntimeError, match=r"linear.cu does not compile with .*"):
        compiler.compiled("linear.cu", {}, "sm_90")


def test_an_unknown_choice_of_kernels(monkeypatch):
    monkeypatch.setenv("LAROSA_CUDA_KERNELS", "opencl")
    with pytest.raises(LarosaError, match="LAROSA_CUDA_KERNELS=opencl is unknown: set it to cuda or triton"):
        backend.chosen_kernels()


def test_gpus_that_are_too_old(monkeypatch):
    class Properties:
        name, major, minor, multi_processor_count = "Tesla V100", 7, 0, 80

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    with pytest.raises(LarosaError, match=r"8.0 or newer, Tesla V100 is not: set LAROSA_CUDA_KERNELS=triton"):
        launch.machine(torch.device("cuda", 99))
