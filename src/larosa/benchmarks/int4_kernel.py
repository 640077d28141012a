"""Int4 kernels of others in the compiled decoder, with random weights: what their users have today.

PyTorch's own ("tinygemm") and, where it is installed, GemLite's (https://github.com/dropbox/gemlite).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

#: Inputs that share a scale in PyTorch's kernel, as few as give the accuracy of larosa's groups.
GROUP = 32
#: The same in GemLite's, as HQQ, which makes its weights, has it by default.
GEMLITE_GROUP = 64
#: Of the layout that PyTorch's kernel reads: the most, which its own users take.
_INNER_TILES = 8


class Int4Products(nn.Module):
    """Products with matrices [N, D] of 4 bits, whose numbers are random: D a multiple of 128, N of 8.

    The kernel reads codes in tiles, and for each output and group of inputs a scale and what is added, in bfloat16.
    """

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.count = len(weights)
        for i, weight in enumerate(weights):
            outputs, inputs = weight.shape
            codes = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8, device=weight.device)
            scales = torch.full(
                (inputs // GROUP, outputs, 2), _scale(inputs), dtype=torch.bfloat16, device=weight.device
            )
            scales[..., 1] = 0
            self.register_buffer(f"codes_{i}", torch.ops.aten._convert_weight_to_int4pack(codes, _INNER_TILES))
            self.register_buffer(f"scales_{i}", scales)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x W^T for each, x [1, D] bfloat16."""
        return [
            torch.ops.aten._weight_int4pack_mm(x, getattr(self, f"codes_{i}"), GROUP, getattr(self, f"scales_{i}"))
            for i in range(self.count)
        ]


class GemliteProducts(nn.Module):
    """The same by GemLite, D a multiple of 64: a scale and a zero point for each output and group of inputs."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        from gemlite.helper import A16W4_HQQ_INT

        super().__init__()
        self.linears = nn.ModuleList()
        for weight in weights:
            outputs, inputs = weight.shape
            codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8, device=weight.device)
            groups = (outputs * inputs // GEMLITE_GROUP, 1)
            scales = torch.full(groups, _scale(inputs), dtype=torch.bfloat16, device=weight.device)
            make = A16W4_HQQ_INT(device=weight.device, dtype=torch.bfloat16)
            self.linears.append(make.from_weights(codes, scales, torch.full_like(scales, 8)))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x W^T for each, x [1, D] bfloat16."""
        return [linear(x) for linear in self.linears]


def _scale(inputs: int) -> float:
    """Such that products of random numbers keep their size."""
    return float(0.2 * inputs**-0.5)


def has_gemlite() -> bool:
    """Whether GemLite is installed."""
    return importlib.util.find_spec("gemlite") is not None


def int4_products(weights: list[torch.Tensor], layer: int, site: str) -> nn.Module:
    """What `CompiledDecoder` takes; gate and up are one product, for one launch."""
    return Int4Products(weights)


def gemlite_products(weights: list[torch.Tensor], layer: int, site: str) -> nn.Module:
    """The same with GemLite's kernels."""
    return GemliteProducts(weights)
