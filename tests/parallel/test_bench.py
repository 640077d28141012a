"""Benchmarks of a shape on ranks, whose weights are made in shards."""

from __future__ import annotations

import pytest
import torch

from larosa import LarosaError
from larosa.benchmarks.decode import DENSE, DENSE_LOW_BIT, LAROSA, measure_config
from larosa.benchmarks.shapes import (
    Layout,
    random_model,
    random_quantization,
    random_sparse_model,
    set_sparsity,
    sparse_models,
)
from larosa.benchmarks.sizes import bytes_read
from larosa.config import LarosaConfig, Selection
from larosa.decoding import Engine
from larosa.formats import AdapterFormat, WeightFormat
from larosa.parallel import Over, Ranks, whole_config
from larosa.sparsity.report import inspect_config

SPARSITY = 0.4
CPU = torch.device("cpu")


@pytest.fixture
def config(family_config):
    return family_config("llama", attention_bias=False, mlp_bias=False)


@pytest.fixture
def few_bits(family_config):
    """Whose outputs two ranks share in whole groups of 32."""
    sizes = {"head_dim": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return family_config("llama", attention_bias=False, mlp_bias=False, **sizes)


@pytest.mark.parametrize(
    ("over", "selection"), [(Over.ALL, Selection.TOP_K), (Over.OWN, Selection.TOP_K), (Over.ALL, Selection.THRESHOLD)]
)
def test_shards_of_every_sparsity_share_the_dense_ones_weights(config, on_ranks, token_ids, over, selection):
    """As rows of a benchmark on GPUs do, and each engine goes on running its own."""
    prompt, token, position = token_ids(1, 6), token_ids(1), torch.tensor([6])

    def run(ranks):
        dense = random_model(config, torch.float32, torch.device("cpu"), ranks=ranks)
        weights = {name: weight.data_ptr() for name, weight in dense.named_parameters()}
        engine = Engine(dense, 8)
        engine.prefill(prompt)
        before = engine.step(token, position)
        limits = []
        options = {"selection": selection, "ranks": ranks, "like": dense}
        for sparsity, shard in sparse_models(config, torch.float32, CPU, (0.2, SPARSITY), **options):
            assert weights.items() <= {name: weight.data_ptr() for name, weight in shard.named_parameters()}.items()
            logits = shard(prompt, use_cache=False).logits
            block = LarosaConfig.parse(whole_config(shard).larosa)
            assert block.sparsity == sparsity
            limits.append(block.limits)
        return before, engine.step(token, position), logits, limits

    (before, after, logits, limits), (*_, others, _) = on_ranks(2, run, over)
    assert torch.equal(before, after)
    assert logits.isfinite().all()
    assert torch.equal(logits, others)
    assert limits[0] != limits[1]
    if selection is Selection.TOP_K:
        whole = random_sparse_model(config, torch.float32, torch.device("cpu"))
        set_sparsity(whole, SPARSITY)
        assert limits[1] == LarosaConfig.parse(whole.config.larosa).keep


def test_rows_of_a_shape(config, on_ranks, monkeypatch):
    monkeypatch.setattr("larosa.benchmarks.bandwidth._BYTES", 1 << 20)
    options = {"dtype": torch.float32, "prompt_tokens": 4, "tokens": 4}
    one = measure_config("tiny", config, (0.5,), **options)
    two = on_ranks(2, lambda ranks: measure_config("tiny", config, (0.5,), **options, ranks=ranks))[0]
    for alone, half in zip(one.rows, two.rows, strict=True):
        assert (half.row, half.sparsity) == (alone.row, alone.sparsity)
        scores = 4 * 3 * (3 * 32 + 56) if half.row == LAROSA else 0  # which Top-K over all ranks reads whole on each
        assert half.bytes_per_token == (alone.bytes_per_token + scores) / 2


@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize("selection", Selection)
@pytest.mark.one_of(2)
def test_ranks_read_together_what_one_process_does(few_bits, on_ranks, weights, selection):
    """But for what each has whole: scores of h1, h3 and a head in planes, scales of adapters."""
    group = None if weights is WeightFormat.FULL else 32
    layout = Layout(adapters=AdapterFormat.INT8, quantization=random_quantization(weights, group))
    options = {"layout": layout, "selection": selection}

    def run(ranks):
        found = []
        for sparsity, shard in sparse_models(few_bits, torch.float32, CPU, (0.0, 0.5), ranks=ranks, **options):
            found.append(bytes_read(shard))
            if sparsity == 0:
                held = {name: weight.nbytes for name, weight in shard.named_parameters()}
                beside = sum(size for name, size in held.items() if "norm" in name or "embed" in name)
                assert found[0] == sum(held.values()) - beside
        return found

    parts = on_ranks(2, run, Over.OWN)
    whole = [bytes_read(model) for _, model in sparse_models(few_bits, torch.float32, CPU, (0.0, 0.5), **options)]
    layers, hidden = few_bits.num_hidden_layers, few_bits.hidden_size
    scores = weights.planes * (2 * layers + (weights.planes > 1)) * hidden
    twice = 4 * (scores + (layers - 1) * hidden)
    totals = [sum(of_rank) - twice for of_rank in zip(*parts, strict=True)]
    # What a site keeps is known on average where it has a threshold, and in halves where it has a count.
    assert totals == pytest.approx(whole, rel=1e-3)
    assert totals[0] == whole[0]


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
def test_rows_of_few_bits(few_bits, on_ranks, monkeypatch, weights):
    monkeypatch.setattr("larosa.benchmarks.bandwidth._BYTES", 1 << 20)
    layout = Layout(quantization=random_quantization(weights, 32))
    options = {"dtype": torch.float32, "prompt_tokens": 4, "tokens": 4, "layout": layout}
    rows = on_ranks(2, lambda ranks: measure_config("tiny", few_bits, (0.5,), **options, ranks=ranks))[0].rows
    assert [(row.row, row.dtype) for row in rows[1:]] == [
        (DENSE, "float32"),
        (DENSE_LOW_BIT, weights),
        (LAROSA, weights),
    ]
    assert rows[3].bytes_per_token < rows[2].bytes_per_token < rows[1].bytes_per_token


def test_outputs_within_a_group_are_not_divided(config, on_ranks):
    layout = Layout(quantization=random_quantization(WeightFormat.INT8, 32))
    with pytest.raises(LarosaError, match="q_proj' has 16 outputs a rank, in groups of 32: start fewer ranks"):
        on_ranks(2, lambda ranks: random_sparse_model(config, torch.float32, CPU, layout=layout, ranks=ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_knows_the_dtype_that_bytes_are_counted_in(config, dtype):
    # One after the other: transformers sets PyTorch's default dtype while it builds, for all threads.
    cpu = torch.device("cpu")
    found = [whole_config(random_model(config, dtype, cpu, ranks=Ranks(rank, 2, cpu))) for rank in range(2)]
    expected = inspect_config(random_model(config, dtype, cpu).config).bytes_dense_total
    assert [inspect_config(each).bytes_dense_total for each in found] == [expected, expected]
