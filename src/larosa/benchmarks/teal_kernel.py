"""TEAL's kernel (arXiv 2408.14690), written from its description, as the products of `CompiledDecoder`.

A product with the entries of x that exceed a threshold: weights are column-major, the comparison happens in the kernel,
the inputs are divided over programs whose partial sums meet in memory by atomic additions. So their order, and with it
the last bits of the result, varies from run to run; it is what is compared with, not what larosa runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

from larosa.benchmarks.compiled_decoder import CompiledDecoder, Products

#: (outputs, inputs, warps) of a program, to choose from.
TILES = ((64, 256, 2), (64, 512, 4), (64, 128, 2), (32, 256, 2), (32, 512, 4), (64, 256, 4))


@triton.jit
def _threshold_kernel(
    x_ptr, weight_ptr, result_ptr, threshold, outputs, inputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    i = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    x = tl.load(x_ptr + i, mask=i < inputs, other=0.0).to(tl.float32)
    kept = tl.abs(x) > threshold
    columns = weight_ptr + i.to(tl.int64)[:, None] * outputs + output[None, :]
    weights = tl.load(columns, mask=kept[:, None] & (output < outputs)[None, :], other=0.0)
    partial = tl.sum(weights.to(tl.float32) * x[:, None], 0)
    tl.atomic_add(result_ptr + output, partial, mask=output < outputs, sem="relaxed")


@torch.library.custom_op("larosa_benchmarks::threshold_linear", mutates_args=())
def threshold_linear(
    x: torch.Tensor, columns: torch.Tensor, threshold: float, outputs: int, inputs: int, warps: int
) -> torch.Tensor:
    """x W^T with the entries of x that are at most `threshold` in magnitude left out.

    Args:
        x: [1, D].
        columns: W^T [D, N], contiguous.
        threshold: not negative.
        outputs: of a program's tile.
        inputs: of a program's tile.
        warps: of a program.

    Returns:
        [1, N] float32.
    """
    width, size = columns.shape
    result = torch.zeros(1, size, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(size, outputs), triton.cdiv(width, inputs))
    _threshold_kernel[grid](x, columns, result, threshold, size, width, outputs, inputs, num_warps=warps)
    return result


@threshold_linear.register_fake
def _(x: torch.Tensor, columns: torch.Tensor, threshold: float, outputs: int, inputs: int, warps: int) -> torch.Tensor:
    return x.new_empty(1, columns.shape[1], dtype=torch.float32)


class ThresholdProducts(nn.Module):
    """The columns of matrices, joined, that an entry above `threshold` reads; `last` is what it last read them with."""

    columns: torch.Tensor

    def __init__(self, columns: torch.Tensor, sizes: list[int], tile: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.sizes = sizes
        self.tile = tile
        self.threshold = 0.0
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x W^T for each, without the small entries of x."""
        if not torch.compiler.is_compiling():
            self.last = x
        product = threshold_linear(x, self.columns, self.threshold, *self.tile).to(x.dtype)
        return list(product.split(self.sizes, dim=-1))


def threshold_products(tiles: dict[tuple[int, int], tuple[int, int, int]]) -> Products:
    """Products that `set_thresholds` sets, by the tile of each shape [N, D], matrices joined; others get the first."""

    def joined(weights: list[torch.Tensor], layer: int, site: str) -> nn.Module:
        outputs, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
        columns = torch.cat([weight.t() for weight in weights], dim=1)
        return ThresholdProducts(columns, [len(weight) for weight in weights], tiles.get((outputs, inputs), TILES[0]))

    return joined


@torch.no_grad()
def set_thresholds(decoder: CompiledDecoder, sparsity: float, token: torch.Tensor, position: torch.Tensor) -> None:
    """Give each site the threshold that leaves out that share of its entries on one token, which is run for it."""
    products = [module for module in decoder.modules() if isinstance(module, ThresholdProducts)]
    for product in products:
        product.threshold = 0.0
    decoder(token, position)
    for product in products:
        assert product.last is not None
        product.threshold = product.last.float().abs().quantile(sparsity).item() if sparsity > 0 else 0.0
        product.last = None


def fastest_tiles(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, sparsity: float = 0.5
) -> dict[tuple[int, int], tuple[int, int, int]]:
    """For each shape [N, D] the tile that runs fastest on this GPU, over weights that no cache holds."""
    fastest = {}
    for outputs, inputs in shapes:
        copies = max(2, 2**29 // (outputs * inputs * dtype.itemsize))
        weights = torch.empty(copies, inputs, outputs, dtype=dtype, device=device).normal_()
        x = torch.randn(1, inputs, device=device).to(dtype)
        threshold = x.float().abs().quantile(sparsity).item()

        def run(
            tile: tuple[int, int, int],
            weights: torch.Tensor = weights,
            x: torch.Tensor = x,
            threshold: float = threshold,
        ) -> float:
            def all_copies() -> None:
                for columns in weights:
                    threshold_linear(x, columns, threshold, *tile)

            return float(triton.testing.do_bench_cudagraph(all_copies, rep=20))

        fastest[outputs, inputs] = min(TILES, key=run)
    return fastest
