"""The decode benchmark of a GPU: what needs none is tested without one, the rest where there is one."""

from __future__ import annotations

import json
from statistics import median

import pytest
import torch

from larosa import LarosaError
from larosa.benchmarks import gpu_decode, shapes
from larosa.benchmarks.compiled_decoder import CompiledDecoder, decoder_bytes
from larosa.benchmarks.decode import DENSE, DENSE_LOW_BIT, LAROSA
from larosa.benchmarks.gpu_decode import measure_gpu_checkpoints, measure_gpu_config, measure_gpu_shape
from larosa.benchmarks.gpu_kernels import measure_gpu_kernels
from larosa.benchmarks.gpu_rows import COMPILED, GEMLITE, TEAL, TINYGEMM, Rows
from larosa.benchmarks.int4_kernel import has_gemlite
from larosa.benchmarks.results import Benchmark
from larosa.benchmarks.shapes import SHAPES, Layout, random_dense_model, random_quantization, sparse_models
from larosa.benchmarks.sizes import weight_bytes
from larosa.cli.bench_gpu import show_decode
from larosa.config import Selection
from larosa.decoding import Engine
from larosa.formats import CacheFormat, WeightFormat
from larosa.ops.backend import chosen_kernels

CPU = torch.device("cpu")
SECONDS = {
    (COMPILED, 0.0): [4.0, 5.0, 6.0],
    (TEAL, 0.5): [4.0, 4.0, 4.0],
    (DENSE, 0.0): [4.5, 4.4, 4.6],
    (LAROSA, 0.25): [3.0, 3.0, 3.1],
    (LAROSA, 0.5): [2.0, 2.0, 2.0],
}
TEXTS = 3  # of the last of them
MACHINE = {"gpu": "a GPU", "torch": "2", "kernels": "cuda"}


READ = 1 << 20


@pytest.fixture(autouse=True)
def small_read_test(monkeypatch):
    """A machine without a GPU need not have room for one's read test."""
    monkeypatch.setattr("larosa.benchmarks.gpu_rows.READ_BYTES", READ)


def texts_of(name, sparsity):
    return TEXTS if (name, sparsity) == (LAROSA, 0.5) else 1


@pytest.fixture
def measured(family_config):
    """A benchmark whose tokens took `SECONDS`, each of 1000 bytes of weights."""
    rows = Rows("tiny", family_config("llama"), CPU, torch.float16, 4, 8)
    for (name, sparsity), seconds in SECONDS.items():
        texts = texts_of(name, sparsity)
        rows.add(name, sparsity, "float16", CacheFormat(torch.float16), 1000, lambda: None, texts)
        rows._rows[-1].seconds += seconds
    return Benchmark(MACHINE, 1e6, list(rows.results(1e6)))


def test_rows_are_what_the_times_come_to(measured):
    cache = 2 * 3 * 2 * 8 * (4 + 4) * 2  # layers, key heads, size, the mean position, float16
    for row, ((name, sparsity), seconds) in zip(measured.rows, SECONDS.items(), strict=True):
        assert (row.row, row.sparsity, row.dtype, row.tokens) == (name, sparsity, "float16", 8)
        texts = texts_of(name, sparsity)
        assert row.batch == texts
        assert row.tokens_per_second == pytest.approx(1 / median(seconds))
        assert row.total_tokens_per_second == pytest.approx(texts / median(seconds))
        assert row.bytes_per_token == 1000 + texts * cache
        assert row.floor_fraction == pytest.approx((1000 + texts * cache) / 1e6 / median(seconds))
        assert row.speedup == pytest.approx(5 * texts / median(seconds))
        assert row.speedup_over_teal == (pytest.approx(4 * texts / median(seconds)) if sparsity == 0.5 else None)


def test_rows_are_shown_and_written(measured, tmp_path, capsys):
    show_decode(measured, tmp_path / "d.json")
    shown = capsys.readouterr().out
    assert "a GPU" in shown
    assert all(name in shown for name in (COMPILED, TEAL, DENSE, LAROSA))
    report = json.loads((tmp_path / "d.json").read_text("utf-8"))
    assert [row["speedup_over_teal"] for row in report["rows"]] == [None, 1, None, None, 2 * TEXTS]
    assert "speedups of all texts together" in shown


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_decoder_are_those_it_takes(family_config, tied):
    config = family_config("llama", tie_word_embeddings=tied)
    decoder = CompiledDecoder(config, 20, torch.bfloat16, CPU)
    parts = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    taken = sum(part.nbytes for name, part in parts.items() if part.dim() > 1 and name not in ("cos", "sin"))
    assert decoder_bytes(config, 20, torch.bfloat16) == taken


@pytest.fixture
def save(tmp_path, tokenizer):
    """save(model, name): the folder of a model."""

    def write(model, name):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def dense(save, make_model):
    return save(make_model("llama"), "dense")


def test_checkpoints_that_the_engine_does_not_run_are_refused_first(save, make_model, quick_convert):
    cats = save(quick_convert(make_model("llama"), method="cats", sparsity=0.25), "cats")
    with pytest.raises(LarosaError, match="does not run method cats"):
        measure_gpu_checkpoints([cats], device=CPU, prompt_tokens=3, tokens=4)


def test_checkpoints_that_cannot_be_compared(dense, save, make_model, monkeypatch):
    with pytest.raises(LarosaError, match="2 of the checkpoints are dense: give one at most"):
        measure_gpu_checkpoints([dense, dense], device=CPU)
    with pytest.raises(LarosaError, match="--tokens at least 2"):
        measure_gpu_checkpoints([dense], device=CPU, tokens=1)
    monkeypatch.setattr("larosa.benchmarks.sizes.available_memory", lambda device: 1000)
    with pytest.raises(LarosaError, match=r"cpu has 0\.0 GB free: give fewer checkpoints"):
        measure_gpu_checkpoints([dense], device=CPU)


def test_memory_that_a_shape_needs(family_config, monkeypatch):
    """Weights of decoders and of models, which share theirs, every cache, and the read test; found by what is refused.

    Without the model in full nothing has its size.
    """
    config = family_config("llama")
    asked = []

    def refuse(needed, device, mend):
        asked.append(needed)
        raise LarosaError("no room")

    monkeypatch.setattr(gpu_decode, "check_room", refuse)
    cases = [
        *[((), (), False, 1), ((), (), True, 1), ((0.25, 0.5), (0.5,), True, 1)],
        *[((0.0, 0.5), (), True, 1), ((0.0, 0.5), (), True, 2)],
    ]
    for sparsities, teal, compiled, layers in cases:
        with pytest.raises(LarosaError, match="no room"):
            measure_gpu_config(
                *("tiny", config, sparsities),
                **{"device": CPU, "dtype": torch.float16, "prompt_tokens": 4, "tokens": 8},
                **{"teal_sparsities": teal, "compiled": compiled, "layout": Layout(layers)},
            )
    options = {"device": CPU, "dtype": torch.float16, "prompt_tokens": 4, "tokens": 8}
    layout = Layout(quantization=random_quantization(WeightFormat.INT8, 32))
    for dense in (True, False):
        with pytest.raises(LarosaError, match="no room"):
            measure_gpu_config("tiny", config, (0.5,), **options, layout=layout, dense=dense, compiled=dense)
    linear, table = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 56), 128 * 32
    adapter = 32 * (32 + 16) // 2 + 32  # 8-bit numbers and a scale an output, in elements of 16 bits
    cache = 2 * 3 * 2 * 8 * (4 + 8 + 1 + 2)
    dense, sparse = linear + 2 * table, linear + 2 * table + 2 * adapter
    decoder = dense + cache
    # A byte a weight, and in each column a scale of 16 bits for every 32 outputs or fewer.
    scales = 3 * (32 * (1 + 1 + 1) + 32 * 1 + 32 * 2 * 2 + 56 * 1) + 32 * 4
    few = (linear + table) // 2 + scales + table + 2 * adapter
    assert [needed - READ for needed in asked] == [
        2 * elements
        for elements in (
            dense + cache,
            dense + cache + decoder,
            sparse + cache + 2 * decoder + 2 * cache,
            sparse + cache + decoder + 2 * cache,
            sparse - adapter + cache + decoder + 2 * cache,
            dense + few + decoder + 3 * cache,
            few + 2 * cache,
        )
    ]


@pytest.mark.gpu
def test_rows_of_a_shape(monkeypatch, family_config):
    monkeypatch.setitem(SHAPES, "tiny", lambda: family_config("llama"))
    result = measure_gpu_shape(
        "tiny", device=torch.device("cuda"), sparsities=(0.5, 0.0, 0.75), prompt_tokens=5, tokens=40
    )
    assert [(row.row, row.sparsity) for row in result.rows] == [
        *[(COMPILED, 0.0), (TEAL, 0.5), (DENSE, 0.0)],
        *[(LAROSA, 0.5), (LAROSA, 0.0), (LAROSA, 0.75)],
    ]
    assert all(0 < row.ms_per_token <= row.ms_per_token_p95 for row in result.rows)


@pytest.mark.gpu
@pytest.mark.parametrize("selection", Selection)
def test_rows_of_several_texts(monkeypatch, family_config, selection):
    monkeypatch.setitem(SHAPES, "tiny", lambda: family_config("llama"))
    result = measure_gpu_shape(
        "tiny",
        **{"device": torch.device("cuda"), "sparsities": (0.5,), "prompt_tokens": 5, "tokens": 40},
        **{"compiled": False, "selection": selection, "batches": (1, 3, 8)},
    )
    assert [(row.sparsity, row.batch) for row in result.rows] == [(s, b) for s in (0.0, 0.5) for b in (1, 3, 8)]


@pytest.mark.gpu
def test_rows_of_a_shape_by_thresholds(monkeypatch, family_config):
    monkeypatch.setitem(SHAPES, "tiny", lambda: family_config("llama"))
    result = measure_gpu_shape(
        "tiny",
        **{"device": torch.device("cuda"), "sparsities": (0.5, 0.0), "prompt_tokens": 5, "tokens": 40},
        **{"compiled": False, "selection": Selection.THRESHOLD},
    )
    assert [(row.row, row.sparsity) for row in result.rows] == [
        (DENSE, 0.0),
        ("LaRoSA, thresholds", 0.5),
        ("LaRoSA, thresholds", 0.0),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WeightFormat)
def test_products_alone(weights):
    device = torch.device("cuda")
    options = {"sparsities": (0.0, 0.5), "rounds": 2, "bytes_of_copies": 1 << 20}
    if weights in (WeightFormat.INT6, WeightFormat.INT5) and chosen_kernels() == "cuda":
        with pytest.raises(LarosaError, match=f"not of {weights}: set LAROSA_CUDA_KERNELS=triton"):
            measure_gpu_kernels("larosa-tiny", device=device, weights=weights, **options)
        return
    rows = measure_gpu_kernels("larosa-tiny", device=device, weights=weights, **options).rows
    assert {row.dtype for row in rows} == {"float16" if weights is WeightFormat.FULL else weights}
    assert all(row.bandwidth_fraction > 0 for row in rows)


@pytest.mark.gpu
def test_rows_of_few_bits(monkeypatch, family_config):
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    monkeypatch.setitem(SHAPES, "tiny", lambda: family_config("llama", **sizes))
    result = measure_gpu_shape(
        "tiny",
        **{"device": torch.device("cuda"), "sparsities": (0.0, 0.5), "teal_sparsities": ()},
        **{"layout": Layout(quantization=random_quantization(WeightFormat.INT4)), "prompt_tokens": 5, "tokens": 40},
    )
    others = [TINYGEMM, GEMLITE] if has_gemlite() else [TINYGEMM]
    assert [(row.row, row.sparsity, row.dtype) for row in result.rows] == [
        *[(COMPILED, 0.0, "float16"), *((other, 0.0, "int4") for other in others)],
        *[(DENSE, 0.0, "float16"), (DENSE_LOW_BIT, 0.0, "int4")],
        *[(LAROSA, 0.0, "int4"), (LAROSA, 0.5, "int4")],
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
def test_rows_without_the_model_in_full(monkeypatch, family_config, weights):
    monkeypatch.setitem(SHAPES, "tiny", lambda: family_config("llama", hidden_size=256, intermediate_size=512))
    layout = Layout(quantization=random_quantization(weights))
    result = measure_gpu_shape(
        "tiny",
        **{"device": torch.device("cuda"), "sparsities": (0.5, 0.0), "selection": Selection.THRESHOLD},
        **{"layout": layout, "prompt_tokens": 5, "tokens": 40, "dense": False},
    )
    assert [(row.row, row.sparsity, row.dtype) for row in result.rows] == [
        (DENSE_LOW_BIT, 0.0, weights),
        *[("LaRoSA, thresholds", sparsity, weights) for sparsity in (0.5, 0.0)],
    ]


@pytest.mark.gpu
def test_models_of_few_bits_never_take_what_the_model_in_full_does(monkeypatch, family_config):
    monkeypatch.setattr(shapes, "_BLOCK", 101)
    config = family_config("llama", hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    layout, device = Layout(quantization=random_quantization(WeightFormat.INT8)), torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dense = random_dense_model(config, torch.float16, device, layout)
    engines = [Engine(dense, 8)]
    for _, model in sparse_models(config, torch.float16, device, (0.5, 0.0), layout, like=dense):
        engines.append(Engine(model, 8))
    assert torch.cuda.max_memory_allocated() - before < weight_bytes(config, torch.float16)


@pytest.mark.gpu
def test_later_decoders_are_compiled_into_graphs_too(family_config):
    """Thresholds that differ from those of the decoder before must not become arguments, which graphs cannot take."""
    from torch._dynamo.utils import counters

    counters.clear()
    for tokens in (4, 8):
        measure_gpu_config(
            *("tiny", family_config("llama"), (0.5,)),
            **{"device": torch.device("cuda"), "dtype": torch.float16, "prompt_tokens": 5, "tokens": tokens},
            teal_sparsities=(0.25, 0.5),
        )
    assert counters["stats"]["unique_graphs"] == 12  # each with two ways of attention
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_checkpoints(dense, save, make_model, quick_convert):
    half = save(quick_convert(make_model("llama"), sparsity=0.5), "0.5")
    quarter = save(quick_convert(make_model("llama"), sparsity=0.25, selection="threshold"), "0.25")
    options = {"device": torch.device("cuda"), "dtype": "float16", "prompt_tokens": 3, "tokens": 4}
    rows = measure_gpu_checkpoints([half, dense, quarter], **options).rows
    assert [(row.row, row.sparsity) for row in rows] == [(COMPILED, 0.0), (DENSE, 0.0), (half, 0.5), (quarter, 0.25)]
    assert {row.shape for row in rows} == {dense}
    alone = measure_gpu_checkpoints([half], **options).rows
    assert [(row.row, row.shape) for row in alone] == [(COMPILED, half), (half, half)]
    assert alone[1].bytes_per_token == rows[2].bytes_per_token < alone[0].bytes_per_token == rows[0].bytes_per_token
