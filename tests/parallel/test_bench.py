"""Benchmarks of a shape on ranks, whose weights are made in shards."""

from __future__ import annotations

import pytest
import torch

from larosa import LarosaError
from larosa.benchmarks.decode import measure_config
from larosa.benchmarks.shapes import (
    DEFAULT_LAYOUT,
    Layout,
    check_ranks,
    random_model,
    random_quantization,
    random_sparse_model,
    set_sparsity,
    sparsified_shards,
)
from larosa.config import LarosaConfig, Selection
from larosa.decoding import Engine
from larosa.formats import WeightFormat
from larosa.parallel import Over, Ranks, whole_config
from larosa.sparsity.report import inspect_config

SPARSITY = 0.4


@pytest.fixture
def config(family_config):
    return family_config("llama", attention_bias=False, mlp_bias=False)


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
        for sparsity, shard in sparsified_shards(dense, (0.2, SPARSITY), DEFAULT_LAYOUT, selection):
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
        assert half.bytes_per_token == pytest.approx(alone.bytes_per_token / 2, rel=0.01)


def test_what_is_not_made_in_shards_is_refused(on_ranks):
    layout = Layout(quantization=random_quantization(WeightFormat.INT8))
    with pytest.raises(LarosaError, match="on several ranks has no --weights of few bits"):
        on_ranks(2, lambda ranks: check_ranks(ranks, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_knows_the_dtype_that_bytes_are_counted_in(config, dtype):
    # One after the other: transformers sets PyTorch's default dtype while it builds, for all threads.
    cpu = torch.device("cpu")
    found = [whole_config(random_model(config, dtype, cpu, ranks=Ranks(rank, 2, cpu))) for rank in range(2)]
    expected = inspect_config(random_model(config, dtype, cpu).config).bytes_dense_total
    assert [inspect_config(each).bytes_dense_total for each in found] == [expected, expected]
