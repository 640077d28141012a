"""Table 3 and Figure 4: which rows they measure, keep and compare; never how fast anything was."""

from __future__ import annotations

import pytest
import torch

from larosa.benchmarks.decode import DENSE, LAROSA, TRANSFORMERS
from larosa.benchmarks.gpu_rows import COMPILED, TEAL, GpuDecodeRow
from larosa.benchmarks.results import Benchmark, per_token
from larosa.decoding import CacheDtype
from larosa.errors import LarosaError
from larosa.reproduce import EXPERIMENTS, figure4, paper, run, speed
from larosa.reproduce.context import Context
from larosa.reproduce.speed import PROMPT_TOKENS, baseline, notes

ON_CPU = [(TRANSFORMERS, 0.0), (DENSE, 0.0)]


def rows(results):
    (table,) = results.tables
    return [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]


@pytest.fixture
def measured(monkeypatch):
    """(sparsities, prompt tokens, tokens, dtype) of each benchmark that really runs."""
    calls = []
    measure = speed.measure_config

    def record(name, config, sparsities, **options):
        calls.append((sparsities, options["prompt_tokens"], options["tokens"], options["dtype"]))
        return measure(name, config, sparsities, **options)

    monkeypatch.setattr(speed, "measure_config", record)
    return calls


def test_table3_has_the_papers_sparsities_at_the_first_length(shared_context, measured):
    results = EXPERIMENTS["table3"].run(shared_context)
    found = rows(results)
    assert [(row["decoder"], row["sparsity"]) for row in found] == [
        *ON_CPU,
        *((LAROSA, sparsity) for sparsity in (0.0, 0.25, 0.5, 0.75)),
    ]
    dense = found[1]
    for row in found:
        assert row["tokens/s"] == pytest.approx(1e3 / row["ms per token"])
        assert row["speedup"] == pytest.approx(row["tokens/s"] / dense["tokens/s"])
    predicted = [row["speedup that bytes predict"] for row in found[2:]]
    assert predicted[0] < dense["speedup that bytes predict"] == 1 < predicted[1] < predicted[2] < predicted[3]
    assert f"6 tokens after {PROMPT_TOKENS}" in results.tables[0].title
    assert "On the CPU" in results.notes[0]
    assert "over the engine dense" in results.notes[1]
    assert measured == [((0.0, 0.25, 0.5, 0.75), 128, 6, torch.float32)]
    again = EXPERIMENTS["table3"].run(shared_context)
    assert rows(again) == found
    assert len(measured) == 1


def test_figure4_measures_each_length_once(dense, settings, tmp_path, measured):
    def tables(**changes):
        results = EXPERIMENTS["figure4"].run(Context(str(dense), settings(**changes), tmp_path))
        assert results.pictures[0].png.startswith(b"\x89PNG")
        return results, rows(results)

    results, found = tables(lengths=(4, 3, 4))
    assert [(row["tokens decoded"], row["decoder"], row["sparsity"]) for row in found] == [
        (length, *row) for length in (3, 4) for row in [*ON_CPU, (LAROSA, 0.5)]
    ]
    assert any("TEAL's kernel is for GPUs" in note for note in results.notes)
    more = tables(lengths=(5, 3, 4))[1]
    assert more[: len(found)] == found
    assert [tokens for _, _, tokens, _ in measured] == [3, 4, 5]
    tables(lengths=(3,), dtype="bfloat16")
    assert measured[-1] == ((0.5,), 128, 3, torch.bfloat16)


def test_keys_and_values_of_8_bits_are_measured_apart_and_noted(dense, settings, tmp_path, measured):
    def run(**changes):
        return EXPERIMENTS["table3"].run(Context(str(dense), settings(lengths=(3,), **changes), tmp_path)).notes

    note = "The engine keeps keys and values in int8."
    assert note not in run()
    assert note in run(kv_cache_dtype=CacheDtype.INT8)
    assert len(measured) == 2


def test_other_hardware_is_measured_anew(shared_context, measured, monkeypatch):
    speed.decoding(shared_context, (0.75,), 3)
    monkeypatch.setattr(speed, "machine", lambda: {"cpu": "another", "threads": 1, "torch": "2"})
    speed.decoding(shared_context, (0.75,), 3)
    assert len(measured) == 2


def test_speed_leaves_no_model_in_memory(shared_context):
    shared_context.dense()
    speed.decoding(shared_context, (0.625,), 2)
    assert shared_context._held is None


@pytest.mark.parametrize("name", ["table3", "figure4"])
def test_what_the_engine_refuses_does_not_stop_a_run_of_everything(dense, settings, tmp_path, name):
    context = Context(str(dense), settings(dtype="float16"), tmp_path)
    with pytest.raises(LarosaError, match="sparse models in float16 on the CPU"):
        run._run(EXPERIMENTS[name], context, everything=False)
    section = run._run(EXPERIMENTS[name], context, everything=True)
    assert "sparse models in float16 on the CPU" in section.missing
    assert section.results.tables == []


def on_gpu(tokens, milliseconds):
    """A benchmark on a GPU with these times of each row."""
    found = [
        GpuDecodeRow(
            **{"shape": "tiny", "dtype": "float16", "prompt_tokens": 128, "tokens": tokens},
            kv_cache_dtype="float16",
            **{"row": row, "sparsity": sparsity, "speedup_over_teal": None},
            **{"speedup": milliseconds[0] / time, "batch": 1, "total_tokens_per_second": 1e3 / time},
            **per_token([time / 1e3] * 2, 1000, 1e6),
        )
        for (row, sparsity), time in zip(
            [(COMPILED, 0.0), (TEAL, 0.5), (DENSE, 0.0), (LAROSA, 0.5)], milliseconds, strict=True
        )
    ]
    return Benchmark({"gpu": "a GPU", "torch": "2", "kernels": "cuda"}, 1e12, found).to_dict()


def test_figure4_on_a_gpu_sets_teal_against_larosa(shared_context, monkeypatch):
    times = {6: [4.0, 3.2, 3.5, 2.0], 4: [4.0, 3.0, 3.5, 2.0]}
    asked = []

    def decoding(context, sparsities, tokens, teal_sparsities):
        asked.append((sparsities, tokens, teal_sparsities))
        return on_gpu(tokens, times[tokens])

    monkeypatch.setattr(figure4, "decoding", decoding)
    results = EXPERIMENTS["figure4"].run(shared_context)
    assert asked == [((0.5,), 4, (0.5,)), ((0.5,), 6, (0.5,))]
    speedups = {(row["tokens decoded"], row["decoder"]): row["speedup"] for row in rows(results)}
    assert speedups[6, "TEAL"] == pytest.approx(1.25)
    assert speedups[6, LAROSA] == pytest.approx(2)
    assert not any("is for GPUs" in note for note in results.notes)
    assert any("TEAL is the compiled decoder" in note for note in results.notes)


def test_speedups_on_a_gpu_are_over_compiled_pytorch():
    found = on_gpu(4, [4.0, 3.0, 3.5, 2.0])
    assert baseline(found)["row"] == COMPILED
    about = " ".join(notes(found))
    assert "On one a GPU, torch 2, cuda kernels, which read 1.00 TB/s" in about
    assert "over compiled PyTorch" in about


def test_the_papers_speedups_are_those_of_its_speeds():
    """But for rounding and for the slips that docs/reproduce.md lists."""
    wrong = []
    for (gpu, method, sparsity), models in paper.TABLE_3.items():
        for name, (tokens, speedup) in models.items():
            if abs(tokens / paper.TABLE_3[gpu, "dense", 0.0][name][0] - speedup) > 0.0101:
                wrong.append((gpu, method, sparsity, name))
    assert wrong == [
        *(("A100", "larosa", 0.0, n) for n in ("LLaMA3-8B", "LLaMA3-70B", "Qwen2.5-7B", "Qwen2.5-72B", "Mistral-7B")),
        *(("H20", "larosa", sparsity, "Mistral-7B") for sparsity in (0.0, 0.25, 0.5, 0.75)),
    ]


@pytest.mark.gpu
def test_on_a_gpu(dense, settings, tmp_path):
    context = Context(str(dense), settings(device="cuda", dtype="float16"), tmp_path)
    table = rows(EXPERIMENTS["table3"].run(context))
    assert [row["decoder"] for row in table] == [COMPILED, DENSE, *[LAROSA] * 4]
    figure = rows(EXPERIMENTS["figure4"].run(context))
    assert [row["decoder"] for row in figure] == [COMPILED, "TEAL", DENSE, LAROSA] * 2
