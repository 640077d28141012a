"""Linears of few bits, as transformers runs them: their weights are made anew each time, one piece after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.formats import SCALE_DTYPE, ColumnFormat
from larosa.models.selectors import copies

#: Outputs whose weights are there at a time: a whole number of groups and of bytes of codes.
_OUTPUTS = 2**14


class QuantizedLinear(nn.Module):
    """A linear that sparsifies its input first, whose weights are stored by few bits (see `ColumnFormat`).

    It computes in the input's dtype: exact weights in float32 and float64, in 16 bits rounded once.
    """

    in_features: int
    out_features: int
    format: ColumnFormat
    codes: nn.Parameter
    scales: nn.Parameter
    bias: nn.Parameter | None
    #: Nothing where a site is sparsified before several linears read it.
    selector: nn.Module

    def __init__(
        self,
        form: ColumnFormat,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        selector: nn.Module | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.format, self.in_features, self.out_features = form, in_features, out_features
        codes, scales = form.empty(out_features, in_features, device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = bias
        self.selector = nn.Identity() if selector is None else selector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = S(x) W^T + b; x [..., D], or what a selector before several linears made of it, [..., planes D]."""
        x = self.selector(x)
        if x.shape[-1] == self.in_features:
            x = copies(x, self.format.planes)
        biases: Iterable[torch.Tensor | None] = (
            repeat(None) if self.bias is None else self.bias.to(x.dtype).split(_OUTPUTS)
        )
        return torch.cat([F.linear(x, *piece) for piece in zip(self._pieces(x.dtype), biases, strict=False)], dim=-1)

    def _pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The weight [N, planes D], some outputs at a time."""
        of = self.format
        for at in range(0, self.out_features, _OUTPUTS):
            outputs = min(_OUTPUTS, self.out_features - at)
            codes = self.codes[:, of.codes_width(at) :][:, : of.codes_width(outputs)]
            scales = self.scales[:, of.groups(at) :][:, : of.groups(outputs)]
            yield of.dequantize(codes, scales, outputs, dtype).T

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """As any module; but scales are what they are in a model of any dtype, and only move."""
        scales = self.scales.data
        super()._apply(fn, recurse)
        if self.scales.dtype is not SCALE_DTYPE:
            self.scales.data = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        planes = "" if self.format.planes == 1 else f", planes={self.format.planes}"
        return f"{sizes}, {self.format.name}, group={self.format.group}{planes}"


def quantized_like(form: ColumnFormat, linear: Any) -> QuantizedLinear:
    """A linear with the sizes, bias, selector and place of another, without its weights."""
    return QuantizedLinear(
        form,
        linear.in_features,
        linear.out_features,
        linear.bias,
        getattr(linear, "selector", None),
        linear.weight.device,
    )
