"""Recorded operators give what they give one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops import column_major
from larosa.ops.cpu.graph import Graph
from tests.examples import examples

from .cases import chances

ops = torch.ops.larosa


def layer(x, position, seed=0, dtype=torch.float32):
    """A function of all operators that can be recorded, on tensors of its own."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    qkv = [column_major(random(outputs, 24)) for outputs in (16, 8, 8)]
    gate_up = [column_major(random(20, 24)) for _ in range(2)]
    output, down, adapter, head = (
        column_major(random(24, 16)),
        column_major(random(24, 20)),
        random(24, 24),
        random(5, 12),
    )
    gain, score, bias = random(24), random(16).abs(), random(24)
    keys, values = random(1, 7, 8), random(1, 7, 8)
    cos, sin = random(7, 8).float(), random(7, 8).float()

    output_of_all, widen, weighted = column_major(random(24, 24)), random(48, 24), random(24).abs()
    # Two columns an entry, each with a score of its own.
    codes, scales = (40 * random(48, 24)).clamp(-127, 127).to(torch.int8), (random(48, 1) / 40).bfloat16()
    planes, both_weighted = ([codes], [scales], [24], 32, "int8", [None]), torch.cat([weighted, weighted / 2])

    def listed(selection, weights, residual):
        values, indices, count = selection
        return ops.sparse_linear(values, indices, weights, [None], residual, count=count)

    def listed_planes(selection, residual):
        values, indices, count = selection
        return ops.low_bit_linear(values, indices, *planes, residual, count)

    def run():
        chosen = ops.rms_norm_top_k(x, gain, 1e-6, 11, None)
        mixed = ops.attend(
            ops.sparse_linear(*chosen, qkv, [None] * 3), keys, values, position, cos, sin, None, None, 0.0, 0.3, 0
        )
        y = ops.sparse_linear(*ops.top_k(mixed, 9, score), [output], [bias], x)
        y = ops.linear(ops.rms_norm(y, gain, 1e-6), [adapter], [None])
        both = ops.sparse_linear(*ops.top_k(y, 12), gate_up, [None, None])
        y = ops.sparse_linear(*ops.silu_mul_top_k(both, 7, None), [down], [None], y)
        y = listed(ops.rms_norm_above(y, gain, 1e-6, 0.7), [output_of_all], y)
        y = listed(ops.above(y, 0.8, weighted), [output_of_all], None)
        y = listed(ops.silu_mul_above(torch.ops.larosa.linear(y, [widen], [None]), 0.1, weighted), [output_of_all], y)
        y = ops.rms_norm(y, None, 1e-6)  # or else numbers overflow
        y = listed_planes(ops.rms_norm_above(y, gain, 1e-6, 0.7, both_weighted), y)
        y = listed_planes(ops.above(y, 0.8, both_weighted), None)
        y = listed_planes(ops.silu_mul_above(ops.linear(y, [widen], [None]), 0.1, both_weighted), y)
        y = ops.low_bit_linear(y, None, *planes, y)
        return ops.linear(ops.silu_mul(y), [head], [None])

    return run


@settings(max_examples=examples(50))
@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_replaying_is_running(seed, dtype):
    x, position = torch.randn(1, 24), torch.tensor([0])
    graph = Graph(layer(x, position, seed, dtype))
    again = layer(x, position, seed, dtype)
    first = graph.output.clone()
    assert torch.equal(first, again())
    for at in range(1, 7):
        x.copy_(torch.randn(1, 24))
        position.fill_(at)
        graph.output.fill_(float("nan"))
        assert torch.equal(graph.replay(), again())
    assert not torch.equal(graph.output, first)


def branches(x, dtype, bias):
    """Three branches whose residuals go through adapters, large enough for several threads to share."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    adapters = [random(370, 370), random(370, 370)]
    digits, scale = (40 * random(370, 740)).clamp(-127, 127).to(torch.int8), random(370) / 2**17
    inner, outer = column_major(random(1000, 370)), column_major(random(370, 500))
    codes, scales = (40 * random(500, 370)).clamp(-127, 127).to(torch.int8), (random(500, 6) / 40).bfloat16()

    def run():
        y = x
        for adapter in [*adapters, None]:
            carried = ops.adapt(y, digits, scale) if adapter is None else ops.linear(y, [adapter], [bias], y)
            gate_up = ops.sparse_linear(*ops.rms_norm_top_k(y, None, 1e-6, 290), [inner], [None])
            chosen = ops.silu_mul_top_k(gate_up, 340)
            if adapter is adapters[1]:
                y = ops.low_bit_linear(*chosen, [codes], [scales], [370], 64, "int8", [bias], carried)
            else:
                y = ops.sparse_linear(*chosen, [outer], [bias], carried)
        return y

    return run


@settings(max_examples=examples(60))
@given(chances("normal"), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_product_beside_others_gives_the_same_bits(chance, dtype):
    x = torch.randn(1, 370, generator=chance.generator)
    run = branches(x, dtype, chance.maybe(370))
    graph = chance.run(Graph, run)
    names = [name for name, _ in graph._calls]
    assert (names.count("linear_meanwhile"), names.count("adapt_meanwhile")) == (2, 1)
    for _ in range(3):
        x.copy_(torch.randn(1, 370, generator=chance.generator))
        graph.output.fill_(float("nan"))
        replayed = graph.replay().clone()
        assert torch.equal(replayed, chance.run(run))


def test_a_product_waits_for_nothing_that_reads_it_first():
    x, position = torch.randn(1, 24), torch.tensor([2])
    square, keys, values = torch.randn(24, 24), torch.randn(1, 7, 8), torch.randn(1, 7, 8)
    columns, narrow = column_major(square), column_major(torch.randn(24, 8))

    def calls(run):
        return [name for name, _ in Graph(run)._calls]

    def added_at_once():
        chosen = ops.top_k(x, 5)
        return ops.sparse_linear(*chosen, [columns], [None], ops.linear(x, [square], [None]))

    def selected_from():
        y = ops.linear(x, [square], [None])
        return ops.sparse_linear(*ops.top_k(y, 5), [columns], [None], y)

    def attended_to():
        y = ops.linear(x, [square], [None])
        mixed = ops.attend(y, keys, values, position, None, None, None, None, 0.0, 0.3, 0)
        return ops.sparse_linear(*ops.top_k(mixed, 5), [narrow], [None], y)

    def never_read():
        y = ops.linear(x, [square], [None])
        ops.top_k(x, 5)
        return y

    for run in (added_at_once, selected_from, attended_to, never_read):
        assert "linear_meanwhile" not in calls(run)


def test_what_was_recorded_stays():
    """Memory that only the recorded function held is not given to somebody else."""
    x, position = torch.randn(1, 24), torch.tensor([2])
    graph = Graph(layer(x, position))
    expected = graph.replay().clone()
    rubbish = [torch.full((size,), float("nan")) for size in range(1, 200)]
    assert torch.equal(graph.replay(), expected)
    assert all(piece.isnan().all() for piece in rubbish)


def test_operators_run_on_their_own_afterwards():
    x, position = torch.randn(1, 24), torch.tensor([2])
    run = layer(x, position)
    graph = Graph(run)
    calls = len(graph._calls)
    run()
    assert len(graph._calls) == calls


def test_only_operators_are_recorded():
    x, position = torch.randn(1, 24), torch.tensor([2])
    run = layer(x, position)
    with pytest.raises(RuntimeError, match=r"aten\.add.* cannot be recorded"):
        Graph(lambda: run() + 1)
    strided = torch.randn(2, 24)[:, ::2]
    with pytest.raises(RuntimeError, match="not contiguous cannot be recorded"):
        Graph(lambda: ops.silu_mul(strided))
    assert Graph(run).replay().shape == (1, 5)


def test_a_position_outside_the_cache():
    x, position = torch.randn(1, 24), torch.tensor([2])
    graph = Graph(layer(x, position))
    position.fill_(7)
    with pytest.raises(IndexError, match="position"):
        graph.replay()
