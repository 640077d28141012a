"""The same input gives the same bits: in any order of threads in the emulator, on every run and replay on a GPU."""

import pytest
import torch

from larosa.ops import column_major
from larosa.ops.cuda import kernels

from .cases import assert_replays_repeat, entries

ops = torch.ops.larosa


@pytest.mark.usefixtures("selects_from_short_ones")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(emulator, target, order):
    if target.kernels is not kernels or target.device.type != "cpu":
        pytest.skip("the emulator's")
    weight = entries("normal", 200, 600, seed=0).half()
    cache = [entries("normal", 2, 90, 16, seed=seed).half() for seed in (1, 2)]
    indices = torch.arange(0, 600, 2, dtype=torch.int32)[None]

    def results():
        x = entries("normal", 1, 600, seed=3)
        yield from target("top_k", x, 300, None)
        yield from target("top_k", entries("tied", 1, 2000, seed=5), 900, None)
        yield from target("rms_norm_top_k", x, None, 1e-5, 300, None)
        yield from target("above", x, 0.5, None)
        yield from target("rms_norm_above", x, None, 1e-5, 0.5, None)
        yield target("rms_norm", x, None, 1e-5)
        yield target("sparse_linear", x[:, :300].contiguous(), indices, [column_major(weight)], [None], None)
        yield target("top_k_linear", x, 300, None, [column_major(weight)], [None], None)
        yield target("rms_norm_top_k_linear", x, None, 1e-5, 300, None, [column_major(weight)], [None], None)
        yield target("rms_norm_top_k_swiglu", x, None, 1e-5, 300, None, [column_major(weight)] * 2, [None] * 2)
        along = (entries("normal", 1, 90, seed=6), column_major(entries("normal", 200, 90, seed=7).half()))
        yield target("sparse_linear", x[:, :300].contiguous(), indices, [column_major(weight)], [None], *along)
        digits = torch.arange(110 * 200).to(torch.int8).view(110, 200).t()
        along = along[0], digits, torch.full((200,), 2**-7)
        selecting = along[0], digits[:192], along[2][:192]
        yield target("sparse_linear", x[:, :300].contiguous(), indices, [column_major(weight)], [None], *along)
        board = torch.zeros(1, dtype=torch.int64)
        yield target("top_k_linear", x, 300, None, [column_major(weight[:192])], [None], *selecting, board)
        count = torch.tensor([100])
        yield target("sparse_linear", x[:, :300].contiguous(), indices, [column_major(weight)], [None], *along, count)
        yield target("above_linear", x, 0.5, None, [column_major(weight)], [None], None)
        yield target("above_linear", x, 0.5, None, [column_major(weight[:192])], [None], *selecting)
        yield target("rms_norm_above_linear", x, None, 1e-5, 0.5, None, [column_major(weight)], [None], None)
        yield target("rms_norm_above_swiglu", x, None, 1e-5, 0.5, None, [column_major(weight)] * 2, [None] * 2)
        codes, ones = torch.arange(600 * 256).to(torch.uint8).view(600, 256), torch.ones(600, 16).bfloat16()
        few_bits = [codes], [ones], [512], 32, "int4", [None]
        yield target("low_bit_linear", x[:, :300].contiguous(), indices, *few_bits)
        yield target("low_bit_site", x, None, 1e-5, None, None, None, False, *few_bits)
        yield target("low_bit_site", x, None, None, None, 300, None, False, *few_bits)
        score = entries("normal", 1200, seed=8).abs()
        twice = [codes.repeat(2, 1)], [ones.repeat(2, 1)], *few_bits[2:]
        yield from target("above", x, 0.5, score)
        yield target("low_bit_linear", x, None, *twice)
        yield target("low_bit_site", x, None, None, score, None, 0.5, False, *twice)
        yield target("low_bit_site", x, None, 1e-5, score, None, 0.5, False, *twice)
        yield target("greedy", x)
        yield target("embed", weight, torch.tensor([3, 199]))
        yield target("linear", x, [weight], [None], None)
        at = torch.tensor([80])
        yield target("attend", entries("normal", 1, 8 * 16, seed=4), *cache, at, *[None] * 4, 0.0, 0.25, 0)
        rounded = [(30 * x).to(torch.int8) for x in cache]
        scales = torch.ones(2, 90, 2, dtype=torch.bfloat16)
        yield target("attend", entries("normal", 1, 8 * 16, seed=4), *rounded, at, *[None] * 4, 0.0, 0.25, 0, scales)

    expected = list(results())
    emulator.order = order
    try:
        for result, first in zip(results(), expected, strict=True):
            assert torch.equal(result, first)
    finally:
        emulator.order = 0


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4096, 11008])
def test_replays_of_a_graph_give_the_bits_of_separate_calls(width):
    device = torch.device("cuda")
    x, residual = torch.randn(1, width, device=device), torch.randn(1, 1024, device=device)
    score = torch.rand(width, device=device)
    weight = torch.randn(1024, width, device=device).half()
    columns = column_major(weight)
    cache = [torch.randn(4, 512, 64, device=device).half() for _ in range(2)]
    position = torch.tensor([0], device=device)

    def run():
        chosen = ops.rms_norm_top_k(x, None, 1e-5, width // 2, score)
        y = ops.sparse_linear(*chosen, [columns], [None], residual)
        y = ops.linear(y, [weight[:, :1024].contiguous()], [None], y)
        fused = ops.rms_norm_top_k_linear(x, None, 1e-5, width // 2, score, [columns] * 4, [None] * 4)
        attended = ops.attend(y[:, :768].contiguous(), *cache, position, *[None] * 4, 0.0, 0.125, 0)
        return [*chosen, y, fused, attended, *ops.top_k(attended, 100), ops.greedy(fused)]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for at in (0, 1, 100, 511):
        x.normal_()
        position.fill_(at)
        for result in captured:
            result.fill_(-1)
        expected = [result.clone() for result in run()]
        assert_replays_repeat(graph, captured, expected)


@pytest.mark.gpu
def test_side_streams_do_not_mix():
    """Operators on two streams at once, each with its own result: nothing is shared between launches."""
    device = torch.device("cuda")
    weight = column_major(torch.randn(4096, 4096, device=device).half())
    inputs = [torch.randn(1, 4096, device=device) for _ in range(2)]
    expected = [ops.sparse_linear(*ops.top_k(x, 2048), [weight], [None]) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.sparse_linear(*ops.top_k(x, 2048), [weight], [None]))
        torch.cuda.synchronize()
        for result, first in zip(results, expected, strict=True):
            assert torch.equal(result, first)
