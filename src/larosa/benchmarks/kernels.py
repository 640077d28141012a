"""Each operator of a decoding step beside PyTorch's dense product, or its own way to the same selection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.benchmarks.bandwidth import read_bandwidth
from larosa.benchmarks.machine import machine
from larosa.benchmarks.results import Benchmark
from larosa.benchmarks.timing import Timing, time_in_turns
from larosa.formats import ColumnFormat, Int4, Int8
from larosa.ops import column_major

SPARSITIES = (0.0, 0.25, 0.5, 0.75)
DTYPES = (torch.bfloat16, torch.float32)
FORMATS = (Int8(Int8.usual_group), Int4(Int4.usual_group))

#: Copies of a weight take so much together that no cache keeps one until its turn comes again, even a quarter of it.
_BYTES_OF_COPIES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """Matrices [N_i, D] that read one vector, as a site of a model has them."""

    outputs: tuple[int, ...]
    depth: int

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.outputs))}x{self.depth}"


#: The sites of a layer of Llama-3.2-1B: what selects, from how many entries, and what is multiplied by the selection.
LAYER = (
    ("rms_norm_top_k", 2048, Shape((2048, 512, 512), 2048)),
    ("top_k", 2048, Shape((2048,), 2048)),
    ("rms_norm_top_k", 2048, Shape((8192, 8192), 2048)),
    ("silu_mul_top_k", 8192, Shape((2048,), 8192)),
)
#: Those of Llama-2-7B's matrices, and of that layer.
SHAPES = (Shape((4096,), 4096), Shape((4096,), 11008), Shape((11008,), 4096), *(shape for _, _, shape in LAYER))
#: Widths that are selected from: hidden and intermediate sizes.
WIDTHS = {"rms_norm_top_k": (2048, 4096, 8192), "top_k": (2048, 4096, 8192), "silu_mul_top_k": (8192, 11008, 14336)}


@dataclass(frozen=True)
class Row:
    """One operator at one setting: of a product the bytes are its weights', of a selection its vectors'.

    `bandwidth` is that of the same run; for products that of summing the same weights, in turns with all else.
    """

    kernel: str
    shape: str
    dtype: str
    threads: int
    sparsity: float
    time: Timing
    dense: Timing
    bytes: int
    bandwidth: float

    @property
    def speedup(self) -> float:
        """Over PyTorch: dense for products, to the same selection for selections."""
        return self.dense.median / self.time.median

    @property
    def floor(self) -> float:
        """Seconds to read the bytes at the measured bandwidth."""
        return self.bytes / self.bandwidth

    @property
    def bandwidth_fraction(self) -> float:
        """Bytes a second of the measured bandwidth."""
        return self.floor / self.time.median

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; times in seconds."""
        row = asdict(self) | {"time": self.time.to_dict(), "dense": self.dense.to_dict()}
        return row | {"speedup": self.speedup, "floor": self.floor, "bandwidth_fraction": self.bandwidth_fraction}


class KernelBenchmark(Benchmark[Row]):
    """What ran where, the read bandwidth at the start in bytes a second, and the rows."""

    @property
    def selection_share(self) -> float | None:
        """What selections, norms and activation included, take of the time of `LAYER`, bfloat16 at 50%, if measured."""
        half = [row for row in self.rows if row.sparsity == 0.5]
        times = {(row.kernel, row.shape, row.dtype): row.time.median for row in half}
        products = [("sparse_linear", str(shape), "bfloat16") for _, _, shape in LAYER]
        if not times.keys() >= set(products):
            return None
        selecting = sum(times[kernel, str(width), "float32"] for kernel, width, _ in LAYER)
        return selecting / (selecting + sum(times[product] for product in products))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return super().to_dict() | {"selection_share": self.selection_share}


def measure_kernels(
    shapes: tuple[Shape, ...] = SHAPES, rounds: int = 20, seed: int = 0, bytes_of_copies: int = _BYTES_OF_COPIES
) -> KernelBenchmark:
    """Measure the CPU kernels with random weights, at `torch.get_num_threads()` threads.

    Args:
        shapes: products to measure.
        rounds: of every measurement; at least 2.
        seed: of the weights, vectors and selections.
        bytes_of_copies: the copies of a weight take at least so much together.
    """
    generator = torch.Generator().manual_seed(seed)
    bandwidth = read_bandwidth()
    rows = [
        row
        for shape in shapes
        for dtype in DTYPES
        for row in _products(shape, dtype, rounds, bytes_of_copies, generator)
    ]
    rows += [
        row
        for shape in shapes
        for form in FORMATS
        for row in _low_bit_products(shape, form, rounds, bytes_of_copies, generator)
    ]
    rows += [
        _selection(kernel, width, bandwidth, rounds, generator) for kernel, widths in WIDTHS.items() for width in widths
    ]
    return KernelBenchmark(machine(), bandwidth, rows)


def _products(
    shape: Shape, dtype: torch.dtype, rounds: int, bytes_of_copies: int, generator: torch.Generator
) -> Iterator[Row]:
    depth, total = shape.depth, sum(shape.outputs)
    size = total * depth * dtype.itemsize
    copies = max(2, -(-bytes_of_copies // size))
    fused = [torch.randn(total, depth, generator=generator).to(dtype) for _ in range(copies)]
    rows = [list(weight.split(shape.outputs)) for weight in fused]
    columns = [[column_major(weight) for weight in weights] for weights in rows]
    biases = [None] * len(shape.outputs)
    x = torch.randn(1, depth, generator=generator)
    typed = x.to(dtype)
    ops = torch.ops.larosa

    def sparse(sparsity: float) -> Callable[[int], object]:
        kept = depth - round(sparsity * depth)
        chosen = [ops.top_k(torch.randn(1, depth, generator=generator), kept) for _ in range(copies)]
        return lambda copy: ops.sparse_linear(*chosen[copy], columns[copy], biases)

    times = time_in_turns(
        {
            "read": lambda copy: fused[copy].view(torch.float32).sum(),
            "dense": lambda copy: F.linear(typed, fused[copy]),
            "linear": lambda copy: ops.linear(x, rows[copy], biases),
            **{str(sparsity): sparse(sparsity) for sparsity in SPARSITIES},
        },
        copies,
        rounds,
    )

    def row(kernel: str, sparsity: float, time: Timing) -> Row:
        read = total * (depth - round(sparsity * depth)) * dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        threads = torch.get_num_threads()
        return Row(kernel, str(shape), name, threads, sparsity, time, times["dense"], read, size / times["read"].median)

    yield row("linear", 0.0, times["linear"])
    for sparsity in SPARSITIES:
        yield row("sparse_linear", sparsity, times[str(sparsity)])


def _low_bit_products(
    shape: Shape, form: ColumnFormat, rounds: int, bytes_of_copies: int, generator: torch.Generator
) -> Iterator[Row]:
    """As `_products`, beside PyTorch's product in bfloat16."""
    depth, outputs = shape.depth, list(shape.outputs)
    column = sum(form.column_bytes(count) for count in outputs)
    copies = max(2, -(-bytes_of_copies // (column * depth)))
    dense = [
        torch.randn(sum(outputs), depth, generator=generator).bfloat16()
        for _ in range(max(2, -(-bytes_of_copies // (2 * sum(outputs) * depth))))
    ]
    weights = [[_random(form, count, depth, generator) for count in outputs] for _ in range(copies)]
    packed = [
        ([codes for codes, _ in one], [scales for _, scales in one], outputs, form.group, form.name) for one in weights
    ]
    biases = [None] * len(outputs)
    as_large = torch.zeros(copies, column * depth // 4)
    x = torch.randn(1, depth, generator=generator)
    ops = torch.ops.larosa

    def sparse(sparsity: float) -> Callable[[int], object]:
        kept = depth - round(sparsity * depth)
        chosen = [ops.top_k(torch.randn(1, depth, generator=generator), kept) for _ in range(copies)]
        return lambda copy: ops.low_bit_linear(*chosen[copy], *packed[copy], biases)

    times = time_in_turns(
        {
            "read": lambda copy: as_large[copy].sum(),
            "dense": lambda copy: F.linear(x.bfloat16(), dense[copy % len(dense)]),
            "0.0": lambda copy: ops.low_bit_linear(x, None, *packed[copy], biases),
            **{str(sparsity): sparse(sparsity) for sparsity in SPARSITIES if sparsity},
        },
        copies,
        rounds,
    )
    bandwidth = column * depth / times["read"].median
    for sparsity in SPARSITIES:
        read, time = column * (depth - round(sparsity * depth)), times[str(sparsity)]
        threads = torch.get_num_threads()
        yield Row("low_bit_linear", str(shape), form.name, threads, sparsity, time, times["dense"], read, bandwidth)


def _random(
    form: ColumnFormat, outputs: int, depth: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a random matrix."""
    codes, scales = form.empty(outputs, depth)
    whole = torch.randint(form.lowest, form.highest + 1, (depth, outputs), generator=generator, dtype=torch.int8)
    return codes.copy_(form.pack(whole)), scales.copy_(torch.rand(scales.shape, generator=generator))


def _selection(kernel: str, width: int, bandwidth: float, rounds: int, generator: torch.Generator) -> Row:
    kept = width // 2
    copies = 16  # vectors; these do stay in the cache, as in a model
    given = 2 * width if kernel == "silu_mul_top_k" else width
    x = [torch.randn(1, given, generator=generator) for _ in range(copies)]
    score = torch.rand(width, generator=generator)
    ops = torch.ops.larosa
    calls: dict[str, tuple[Callable[[torch.Tensor], object], Callable[[torch.Tensor], torch.Tensor]]] = {
        "top_k": (lambda x: ops.top_k(x, kept, score), lambda x: x),
        "rms_norm_top_k": (
            lambda x: ops.rms_norm_top_k(x, None, 1e-5, kept, score),
            lambda x: F.rms_norm(x, (width,), None, 1e-5),
        ),
        "silu_mul_top_k": (
            lambda x: ops.silu_mul_top_k(x, kept, score),
            lambda x: F.silu(x[:, :width]) * x[:, width:],
        ),
    }
    ours, produced = calls[kernel]

    def with_pytorch(copy: int) -> torch.Tensor:
        y = produced(x[copy])
        return y.gather(1, (y.abs() * score).topk(kept, sorted=False).indices)

    times = time_in_turns({"ours": lambda copy: ours(x[copy]), "PyTorch": with_pytorch}, copies, rounds)
    touched = 4 * (given + width + 2 * kept)
    return Row(
        kernel, str(width), "float32", torch.get_num_threads(), 0.5, times["ours"], times["PyTorch"], touched, bandwidth
    )
