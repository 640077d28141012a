"""PyTorch's own int4 kernel ("tinygemm") in the compiled decoder, with random weights: what its users have today."""

from __future__ import annotations

import torch
from torch import nn

#: Inputs that share a scale, as few as give the accuracy of larosa's groups.
GROUP = 32
#: Of the layout that the kernel reads: the most, which its own users take.
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
                (inputs // GROUP, outputs, 2), 0.2 * inputs**-0.5, dtype=torch.bfloat16, device=weight.device
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


def int4_products(weights: list[torch.Tensor], layer: int, site: str) -> nn.Module:
    """What `CompiledDecoder` takes; gate and up are one product, for one launch."""
    return Int4Products(weights)
