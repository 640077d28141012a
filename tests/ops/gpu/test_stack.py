"""All layers in one launch against the same layers operator by operator, in float64."""

from dataclasses import replace

import pytest
import torch

from larosa.decoding.layers import Attention, DecodeLayer, Norm, Site, _AsItIs, _Gated
from larosa.ops import column_major
from larosa.ops.attend import attend_reference
from larosa.ops.cuda import kernels as cuda_kernels
from larosa.ops.cuda import launch
from larosa.ops.cuda.stack import Stack, obstacle
from larosa.ops.linear import linear_reference, sparse_linear_reference

from .cases import DTYPES, bits, doubled, seeded

LENGTH = 200


@pytest.fixture
def gpu(target, monkeypatch):
    """The device that stacks run on: a GPU, or the CPU with an emulator behind it."""
    if target.kernels is not cuda_kernels:
        pytest.skip("CUDA C++ alone has it")
    if target.device.type == "cpu":
        # The emulator stands in for launches by name; a stack makes its own.
        emulator = cuda_kernels.launch.__self__
        monkeypatch.setattr(launch, "launch", emulator.launch)
        monkeypatch.setattr(launch, "machine", emulator.machine)
        monkeypatch.setattr(launch, "shared_memory", lambda *_: 0)
    return target.device


class Layers:
    """Random layers, their tables and a state to start from; everything a test may want to change is an option."""

    def __init__(
        self, dtype, *, layers=2, hidden=64, inner=96, heads=4, key_heads=2, size=16, keep=0.5, adapters=True,
        biased=False, scored=True, gained=True, normed_heads=False, window=0, rotates=True, length=LENGTH, seed=0,
    ):  # fmt: skip
        self.random = seeded(seed)
        self.dtype, self.seed = dtype, seed
        angles = torch.rand(length, size // 2, generator=self.random).repeat(1, 2)
        self.tables = angles.cos(), angles.sin()
        outputs = {
            "h1": ((heads * size, key_heads * size, key_heads * size), hidden),
            "h2": ((hidden,), heads * size),
            "h3": ((inner, inner), hidden),
            "h4": ((hidden,), inner),
        }
        sources = {"h2": _AsItIs(), "h4": _Gated()}

        def site(name):
            sizes, width = outputs[name]
            source = sources.get(name) or Norm(self.normal(width).abs() if gained else torch.ones(width), 1e-5)
            return Site(
                source,
                [column_major(self.weight(n, width)) for n in sizes],
                [self.normal(n).to(dtype) if biased else None for n in sizes],
                None if keep == 1 else max(int(keep * width), 1),
                self.normal(width).abs() if scored and keep != 1 else None,
            )

        def attention():
            cache = [self.normal(key_heads, length, size).to(dtype) for _ in range(2)]
            gains = [self.normal(size).abs() if normed_heads else None for _ in range(2)]
            return Attention(*cache, *(self.tables if rotates else (None, None)), *gains, 1e-6, size**-0.5, window)

        self.layers = [
            DecodeLayer(
                site("h1"),
                attention(),
                site("h2"),
                column_major(self.weight(hidden, hidden)) if adapters else None,
                site("h3"),
                site("h4"),
                column_major(self.weight(hidden, hidden)) if adapters and index < layers - 1 else None,
            )
            for index in range(layers)
        ]
        self.x = self.normal(1, hidden)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.random)

    def weight(self, outputs, width):
        return (self.normal(outputs, width) / width**0.5).to(self.dtype)

    def run(self, device, *positions):
        """The state after each position, by a stack whose cache goes on from one to the next."""
        there = [_moved(layer, device) for layer in self.layers]
        stack = Stack(there, tuple(table.to(device) for table in self.tables))
        results = [
            stack(self.x.clone().to(device), torch.tensor([position], device=device)).cpu() for position in positions
        ]
        return torch.cat(results), [(layer.attention.keys.cpu(), layer.attention.values.cpu()) for layer in there]

    def expected(self, *positions):
        caches = [(doubled(layer.attention.keys), doubled(layer.attention.values)) for layer in self.layers]
        return torch.cat([self._expected(position, caches) for position in positions]), caches

    def _expected(self, position, caches):
        x = self.x.double()
        for layer, cache in zip(self.layers, caches, strict=True):
            attention = layer.attention
            options = attention.eps, attention.scale, attention.window
            tables = [doubled(t) for t in (attention.cos, attention.sin, attention.q_gain, attention.k_gain)]
            qkv = _read(layer.h1, x)
            y = attend_reference(qkv, *cache, torch.tensor([position]), *tables, *options)
            x = _read(layer.h2, y, _carried(x, layer.attention_adapter))
            x = _read(layer.h4, _read(layer.h3, x), _carried(x, layer.residual_adapter))
        return x


def _read(site, x, residual=None):
    source = site.source
    weights, biases = [doubled(w) for w in site.weights], [doubled(b) for b in site.biases]
    every = _every(source, x)
    if site.k is None:
        return linear_reference(every, weights, biases, residual)
    from larosa.ops.select import top_k_reference

    return sparse_linear_reference(*top_k_reference(every, site.k, doubled(site.score)), weights, biases, residual)


def _every(source, x):
    from larosa.ops.norm import rms_norm_reference, silu_mul_reference

    if isinstance(source, Norm):
        return rms_norm_reference(x, doubled(source.gain), source.eps)
    return silu_mul_reference(x) if isinstance(source, _Gated) else x


def _carried(x, adapter):
    return x if adapter is None else linear_reference(x, [doubled(adapter)], [None])


def _moved(layer, device):
    def site(one):
        source = replace(one.source, gain=one.source.gain.to(device)) if isinstance(one.source, Norm) else one.source
        weights = [column_major(w.to(device)) for w in one.weights]
        biases = [None if b is None else b.to(device) for b in one.biases]
        return Site(source, weights, biases, one.k, None if one.score is None else one.score.to(device))

    def there(x):
        return None if x is None else x.to(device)

    old = layer.attention
    attention = replace(
        old, keys=old.keys.clone().to(device), values=old.values.clone().to(device), cos=there(old.cos),
        sin=there(old.sin), q_gain=there(old.q_gain), k_gain=there(old.k_gain),
    )  # fmt: skip

    def adapter(matrix):
        return None if matrix is None else column_major(matrix.to(device))

    return DecodeLayer(
        *(site(layer.h1), attention, site(layer.h2), adapter(layer.attention_adapter)),
        *(site(layer.h3), site(layer.h4), adapter(layer.residual_adapter)),
    )


def compare(layers, gpu, *positions, tolerance=1e-4):
    result, caches = layers.run(gpu, *positions)
    expected, expected_caches = layers.expected(*positions)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(caches, expected_caches, strict=True):
        for part, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(part.double(), other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("keep", [0.5, 0.25, 1])
def test_it_is_the_layers_one_after_another(gpu, keep):
    compare(Layers(torch.float32, keep=keep), gpu, 0, 1, 40)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_short_formats(gpu, dtype):
    # What is stored in the cache is rounded, and the reference's is not.
    compare(Layers(dtype, layers=1, adapters=False), gpu, 30, tolerance=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"adapters": False},
        {"biased": True},
        {"scored": False, "gained": False},
        {"normed_heads": True},
        {"window": 7},
        {"rotates": False},
        {"heads": 3, "key_heads": 3, "size": 24},
        {"heads": 10, "key_heads": 2},
        {"heads": 7, "key_heads": 1},
        {"hidden": 520, "inner": 1032, "heads": 2, "key_heads": 1, "layers": 1},
        {"hidden": 8, "inner": 8, "heads": 1, "key_heads": 1, "size": 8},
        {"inner": 5000, "layers": 1},
    ],
    ids=str,
)
def test_shapes_and_parts_of_a_layer(gpu, options):
    compare(Layers(torch.float32, **options), gpu, 12, 13)


def test_long_contexts_are_shared_by_blocks(gpu):
    compare(Layers(torch.float32, layers=1, heads=2, key_heads=1, size=64, length=2000), gpu, 1900, 1901, 3)


@pytest.mark.parametrize("position", [-1, LENGTH, 2**40])
def test_positions_outside_the_cache(gpu, position):
    layers = Layers(torch.float32)
    result, caches = layers.run(gpu, position)
    assert result.isnan().all()
    for layer, (keys, values) in zip(layers.layers, caches, strict=True):
        assert torch.equal(keys, layer.attention.keys)
        assert torch.equal(values, layer.attention.values)


@pytest.mark.parametrize("kind", ["tied", "zero", "many tied"])
def test_ties_go_to_the_lowest_index(gpu, kind):
    """At h2 of one layer whose attention gives its values: what is kept shows in a product with the identity."""
    width = 1200 if kind == "many tied" else 64
    heads = width // 8
    sizes = {"layers": 1, "hidden": width, "heads": heads, "key_heads": heads, "size": 8}
    layers = Layers(torch.float32, **sizes, adapters=False, scored=False)
    (layer,) = layers.layers
    layer.h2.weights[0].copy_(torch.eye(width))
    for weight in layer.h4.weights:
        weight.zero_()
    value = (2 * layers.normal(width)).round() if kind == "tied" else torch.full((width,), float(kind != "zero"))
    layer.h1.weights[2].zero_()
    layer.h1.biases[2] = value
    result, _ = layers.run(gpu, 0)
    kept = (result - layers.x)[0]
    from larosa.ops.top_k import keep_top_k

    expected = keep_top_k(value[None], layer.h2.k)[0]
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)


def test_values_that_are_not_finite_show(gpu):
    layers = Layers(torch.float32)
    layers.x[0, 3] = torch.nan
    assert layers.run(gpu, 5)[0].isnan().any()


def test_it_repeats_bit_by_bit(gpu, target):
    layers = Layers(torch.float16, heads=2, key_heads=1, length=1500)
    first, _ = layers.run(gpu, 3, 1400)
    again, _ = layers.run(gpu, 3, 1400)
    assert torch.equal(bits(first), bits(again))


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_threads_does_not_matter(gpu, emulator, order):
    if gpu.type != "cpu":
        pytest.skip("the emulator's")
    layers = Layers(torch.float32, heads=2, key_heads=1, size=64, length=900)
    first, _ = layers.run(gpu, 800)
    emulator.order = order
    try:
        assert torch.equal(layers.run(gpu, 800)[0], first)
    finally:
        emulator.order = 0


def test_what_does_not_fit(gpu):
    def why(change, **options):
        layers = [_moved(layer, gpu) for layer in Layers(torch.float32, **options).layers]
        return obstacle(change(layers))

    assert why(lambda layers: layers) is None
    assert "whole pieces" in why(lambda layers: layers, inner=97)
    assert "several shapes" in why(lambda layers: [layers[0], _moved(Layers(torch.float32, inner=104).layers[0], gpu)])
    compares = lambda layers: [replace(layers[0], h4=replace(layers[0].h4, k=None, threshold=0.1))]  # noqa: E731
    assert "threshold" in why(compares)
    assert "more than 32768" in why(lambda layers: layers, inner=40000, layers=1)


@pytest.mark.gpu
def test_replays_of_a_graph_go_on_from_each_other():
    device = torch.device("cuda")
    layers = Layers(torch.float16, hidden=512, inner=1024, heads=8, key_heads=2, size=64, layers=3)
    expected, _ = layers.run(device, *range(20))
    there = [_moved(layer, device) for layer in layers.layers]
    stack = Stack(there, tuple(table.to(device) for table in layers.tables))
    hidden, position = torch.empty(1, 512, device=device), torch.tensor([0], device=device)
    start = layers.x.to(device)
    stack(hidden, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden.copy_(start)
        stack(hidden, position)
        position += 1
    for row in expected:
        graph.replay()
        assert torch.equal(bits(hidden.cpu()[0]), bits(row))
