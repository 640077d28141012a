"""Each operator of a decoding step on a GPU, beside cuBLAS where it has a dense counterpart, and a layer of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.architectures import Heads
from larosa.benchmarks.gpu_timing import gpu_machine, gpu_read_bandwidth, time_captured
from larosa.benchmarks.results import Benchmark
from larosa.benchmarks.shapes import random_adapter, shape_config
from larosa.benchmarks.timing import Call, Timing
from larosa.formats import AdapterFormat, ColumnFormat, WeightFormat
from larosa.ops import column_major
from larosa.ops.low_bit import LowBitWeights

SPARSITIES = (0.0, 0.25, 0.5, 0.75)
POSITIONS = (127, 2047, 8191)

#: Copies of a weight take so much together that no cache keeps one until its turn comes again, even a quarter of it.
_BYTES_OF_COPIES = 512 << 20
_ops: Any = torch.ops.larosa


@dataclass(frozen=True)
class GpuKernelRow:
    """One operator at one setting; times in seconds. `floor` is what reading its weights or its cache takes.

    `speedup` is over PyTorch's dense product in the same format; None for what has no such counterpart.
    """

    kernel: str
    shape: str
    dtype: str
    sparsity: float
    time: Timing
    floor: float
    bandwidth_fraction: float
    speedup: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self) | {"time": self.time.to_dict()}


GpuKernelBenchmark = Benchmark[GpuKernelRow]


def measure_gpu_kernels(
    shape: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    sparsities: tuple[float, ...] = SPARSITIES,
    positions: tuple[int, ...] = POSITIONS,
    weights: WeightFormat | None = None,
    rounds: int = 20,
    seed: int = 0,
    bytes_of_copies: int = _BYTES_OF_COPIES,
) -> GpuKernelBenchmark:
    """Measure the operators with the matrices of a known shape's layer, random.

    Args:
        shape: one of `larosa.benchmarks.shapes.SHAPES`.
        device: a GPU.
        dtype: of weights and cache.
        sparsities: of the lists.
        positions: attended to, each with a cache that just holds them.
        weights: only products with weights of this format; None for those of all, and the other operators.
        rounds: of every measurement.
        seed: of everything random.
        bytes_of_copies: the copies of a weight take at least so much together.
    """
    torch.manual_seed(seed)
    config = shape_config(shape)
    matrices = layer_matrices(config)
    with torch.cuda.device(device):  # streams and events are the current device's
        bench = _Bench(device, dtype, gpu_read_bandwidth(device), rounds, bytes_of_copies)
        rows: list[GpuKernelRow] = []
        if weights in (None, WeightFormat.FULL):
            rows += [row for name, sizes in matrices.items() for row in bench.products(name, *sizes, sparsities)]
        few = (WeightFormat.INT8, WeightFormat.INT4) if weights is None else (weights,)
        for form in few:
            if form is not WeightFormat.FULL:
                rows += bench.low_bit_products(form, low_bit_matrices(config), sparsities)
        if weights is None:
            rows += bench.selections(config.hidden_size, config.intermediate_size)
            rows += [bench.attention(Heads.of(config), position) for position in positions]
            rows += bench.layer(config, 0.5)
    return GpuKernelBenchmark(gpu_machine(device), bench.bandwidth, rows)


def layer_matrices(config: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Outputs of each matrix and the inputs they share, of all products in a layer, by name."""
    heads, hidden, intermediate = Heads.of(config), config.hidden_size, config.intermediate_size
    queries, keys = heads.keys * heads.group * heads.size, heads.keys * heads.size
    return {
        "q+k+v": ((queries, keys, keys), hidden),
        "o": ((hidden,), queries),
        "gate+up": ((intermediate, intermediate), hidden),
        "down": ((hidden,), intermediate),
        "adapter": ((hidden,), hidden),
    }


def low_bit_matrices(config: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """The same of what is stored by few bits."""
    matrices = layer_matrices(config)
    del matrices["adapter"]
    return {**matrices, "head": ((config.vocab_size,), config.hidden_size)}


@dataclass(frozen=True)
class _Bench:
    device: torch.device
    dtype: torch.dtype
    bandwidth: float
    rounds: int
    bytes_of_copies: int

    def products(
        self, name: str, outputs: tuple[int, ...], depth: int, sparsities: tuple[float, ...]
    ) -> Iterator[GpuKernelRow]:
        """Dense by PyTorch and by larosa, sparse, and where an operator does both, with the selection or comparison."""
        total = sum(outputs)
        size = total * depth * self.dtype.itemsize
        copies = max(2, -(-self.bytes_of_copies // size))
        fused = [self._random(total, depth, dtype=self.dtype) for _ in range(copies)]
        columns = [[column_major(weight) for weight in each.split(outputs)] for each in fused]
        biases = [None] * len(outputs)
        x = self._random(1, depth)
        typed = x.to(self.dtype)

        def sparse(sparsity: float) -> Call:
            values, indices = self._selected(depth, sparsity)
            return lambda copy: _ops.sparse_linear(values, indices, columns[copy], biases)

        def selected(sparsity: float) -> Call:
            return lambda copy: _ops.top_k_linear(x, _kept(depth, sparsity), None, columns[copy], biases)

        def compared(sparsity: float) -> Call:
            dropped = depth - _kept(depth, sparsity)
            threshold = float(x.abs().flatten().kthvalue(dropped).values) if dropped else 0.0
            return lambda copy: _ops.above_linear(x, threshold, None, columns[copy], biases)

        calls = {"sparse_linear": sparse}
        if name not in ("down", "adapter"):
            calls["top_k_linear"] = selected
        if name != "adapter":
            calls["above_linear"] = compared
        times = time_captured(
            {
                "pytorch": lambda copy: F.linear(typed, fused[copy]),
                "linear": lambda copy: _ops.linear(x, [fused[copy]], [None]),
                **{f"{kernel} {sparsity}": call(sparsity) for sparsity in sparsities for kernel, call in calls.items()},
            },
            copies,
            self.rounds,
        )
        label, dense = f"{name} {'+'.join(map(str, outputs))}x{depth}", times["pytorch"]
        for kernel in ("pytorch", "linear"):
            yield self._row(kernel, label, 0.0, times[kernel], size, dense)
        for sparsity in sparsities:
            read = total * _kept(depth, sparsity) * self.dtype.itemsize
            for kernel in calls:
                yield self._row(kernel, label, sparsity, times[f"{kernel} {sparsity}"], read, dense)

    def low_bit_products(
        self, stored: WeightFormat, matrices: dict[str, tuple[tuple[int, ...], int]], sparsities: tuple[float, ...]
    ) -> Iterator[GpuKernelRow]:
        """Products by few bits, with all columns at 0 and with listed ones of any plane."""
        form = stored.columns(stored.usual_group, stored.planes)
        for name, (outputs, depth) in matrices.items():
            columns = form.planes * depth
            column = sum(form.column_bytes(size) for size in outputs) // form.planes
            copies = max(2, -(-self.bytes_of_copies // (column * columns)))
            weights = [random_codes(form, outputs, depth, self.device) for _ in range(copies)]
            biases = [None] * len(outputs)

            def call(sparsity: float, depth: int = depth, weights: Any = weights, biases: Any = biases) -> Call:
                if sparsity:
                    values, listed = self._selected(form.planes * depth, sparsity)
                else:
                    values, listed = self._random(1, depth), None
                return lambda copy: _ops.low_bit_linear(values, listed, *weights[copy], biases)

            times = time_captured({str(sparsity): call(sparsity) for sparsity in sparsities}, copies, self.rounds)
            label = f"{name} {'+'.join(map(str, outputs))}x{depth}"
            for sparsity in sparsities:
                read = column * _kept(columns, sparsity)
                yield self._row("low_bit_linear", label, sparsity, times[str(sparsity)], read, None, stored)

    def selections(self, hidden: int, intermediate: int) -> Iterator[GpuKernelRow]:
        """At half of the entries, with scores; one after the other, as dependent launches."""
        calls: list[tuple[str, int, Callable[[torch.Tensor, int, torch.Tensor], object]]] = [
            ("top_k", hidden, lambda x, k, score: _ops.top_k(x, k, score)),
            ("rms_norm_top_k", hidden, lambda x, k, score: _ops.rms_norm_top_k(x, None, 1e-5, k, score)),
            ("top_k", intermediate, lambda x, k, score: _ops.top_k(x, k, score)),
            ("silu_mul_top_k", intermediate, lambda x, k, score: _ops.silu_mul_top_k(x, k, score)),
        ]
        for kernel, width, call in calls:
            x = self._random(1, 2 * width if kernel == "silu_mul_top_k" else width)
            score = torch.rand(width, device=self.device)

            def once(_: int, call: Any = call, x: torch.Tensor = x, score: torch.Tensor = score) -> object:
                return call(x, len(score) // 2, score)

            time = time_captured({kernel: once}, 64, self.rounds)[kernel]
            yield self._row(kernel, str(width), 0.5, time, 0, None)

    def attention(self, heads: Heads, position: int) -> GpuKernelRow:
        """At one position, the last of its cache."""
        shape = (heads.keys, position + 1, heads.size)
        size = 2 * torch.Size(shape).numel() * self.dtype.itemsize
        copies = min(64, max(2, -(-self.bytes_of_copies // size)))
        caches = [[self._random(*shape, dtype=self.dtype) for _ in range(2)] for _ in range(copies)]
        qkv = self._random(1, (heads.group + 2) * heads.keys * heads.size)
        cos, sin = (self._random(position + 1, heads.size) for _ in range(2))
        at = torch.tensor([position], device=self.device)

        def call(copy: int) -> object:
            return _ops.attend(qkv, *caches[copy], at, cos, sin, None, None, 0.0, heads.size**-0.5, 0)

        time = time_captured({"attend": call}, copies, self.rounds)["attend"]
        return self._row("attend", f"{heads.keys}x{heads.group} heads, {position + 1} positions", 0.0, time, size, None)

    def layer(self, config: Any, sparsity: float) -> Iterator[GpuKernelRow]:
        """A layer's operators in their order, with parts left out: the differences are what the parts cost."""
        heads = Heads.of(config)
        matrices = layer_matrices(config)
        outputs = {name: sum(sizes) for name, (sizes, _) in matrices.items()}
        elements = sum(
            outputs[name] * _kept(depth, sparsity) for name, (_, depth) in matrices.items() if name != "adapter"
        )
        copies = 4
        weights = [
            {
                name: [column_major(self._random(size, depth, dtype=self.dtype)) for size in sizes]
                for name, (sizes, depth) in matrices.items()
                if name != "adapter"
            }
            for _ in range(copies)
        ]
        lists = {name: self._selected(depth, sparsity) for name, (_, depth) in matrices.items()}
        scores = {name: torch.rand(depth, device=self.device) for name, (_, depth) in matrices.items()}
        given = {name: self._random(1, total) for name, total in outputs.items()}
        attended = self._random(1, matrices["o"][1])
        cache = [self._random(heads.keys, 256, heads.size, dtype=self.dtype) for _ in range(2)]
        cos, sin = (self._random(256, heads.size) for _ in range(2))
        at = torch.tensor([128], device=self.device)
        board = torch.zeros(1, dtype=torch.int64, device=self.device)

        def call(adapters: list[torch.Tensor], scale: torch.Tensor | None, selects: bool, attends: bool) -> Call:
            def product(copy: int, name: str, selection: Any, *added: torch.Tensor | None) -> torch.Tensor:
                chosen = weights[copy][name]
                result: torch.Tensor = _ops.sparse_linear(*selection, chosen, [None] * len(chosen), *added)
                return result

            def selected(
                copy: int, name: str, operator: Any, arguments: Any, *added: torch.Tensor | None
            ) -> torch.Tensor:
                if not selects:
                    return product(copy, name, lists[name], *added)
                chosen = weights[copy][name]
                result: torch.Tensor = operator(
                    *arguments, len(lists[name][0][0]), scores[name], chosen, [None] * len(chosen), *added
                )
                return result

            def run(copy: int) -> torch.Tensor:
                x = given["adapter"]
                qkv = selected(copy, "q+k+v", _ops.rms_norm_top_k_linear, (x, None, 1e-5))
                y = attended
                if attends:
                    y = _ops.attend(qkv, *cache, at, cos, sin, None, None, 0.0, heads.size**-0.5, 0)
                x = selected(copy, "o", _ops.top_k_linear, (y,), x)
                gated = selected(copy, "gate+up", _ops.rms_norm_top_k_swiglu, (x, None, 1e-5))
                if not selects:
                    return product(copy, "down", lists["down"], x, adapters[copy], scale)
                return selected(copy, "down", _ops.top_k_linear, (gated,), x, adapters[copy], scale, board)

            return run

        for stored in AdapterFormat:
            adapter = random_adapter(config.hidden_size, self.dtype, stored)
            scale = None if adapter.scale is None else adapter.scale.to(self.device)
            adapters = [column_major(adapter.weight.to(self.device, copy=True)) for _ in range(copies)]
            times = time_captured(
                {
                    "layer: products": call(adapters, scale, selects=False, attends=False),
                    "layer: products, selections": call(adapters, scale, selects=True, attends=False),
                    "layer: products, selections, attention": call(adapters, scale, selects=True, attends=True),
                },
                copies,
                self.rounds,
            )
            read = elements * self.dtype.itemsize + adapter.weight.nbytes
            for name, time in times.items():
                yield self._row(name, f"{stored} adapter included", sparsity, time, read, None)

    def _row(
        self,
        kernel: str,
        shape: str,
        sparsity: float,
        time: Timing,
        size: int,
        dense: Timing | None,
        stored: str | None = None,
    ) -> GpuKernelRow:
        floor = size / self.bandwidth
        speedup = None if dense is None else dense.median / time.median
        name = stored or str(self.dtype).removeprefix("torch.")
        return GpuKernelRow(kernel, shape, name, sparsity, time, floor, floor / time.median, speedup)

    def _selected(self, depth: int, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(depth, device=self.device)[: _kept(depth, sparsity)].sort().values
        return self._random(1, len(order)), order.int()[None]

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


def random_codes(form: ColumnFormat, outputs: tuple[int, ...], depth: int, device: torch.device) -> LowBitWeights:
    """Matrices of few bits, their numbers random."""
    empty = [form.empty(size, depth, device) for size in outputs]
    codes = [each.view(torch.uint8).random_(256).view(each.dtype) for each, _ in empty]
    return LowBitWeights(codes, [scales.normal_() for _, scales in empty], list(outputs), form.group, form.name)


def _kept(depth: int, sparsity: float) -> int:
    return depth - round(sparsity * depth)
