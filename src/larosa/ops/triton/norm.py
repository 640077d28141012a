"""The vectors that are sparsified elsewhere, in full."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from larosa.ops import checks

_BLOCK = 1024


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See `rms_norm_reference`."""
    rows, width = checks.vectors("x", x)
    checks.vector("gain", gain, width)
    result = torch.empty_like(x)
    if x.numel():
        _rms_norm_kernel[(rows,)](x, gain, result, width, eps, triton.next_power_of_2(width), num_warps=8)
    return result


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `silu_mul_reference`."""
    rows, width = len(gate_up), checks.halves("gate_up", gate_up)
    result = gate_up.new_empty(rows, width)
    if result.numel():
        _silu_mul_kernel[(rows, triton.cdiv(width, _BLOCK))](gate_up, result, width, _BLOCK)
    return result


@triton.jit
def _rms_norm_kernel(x_ptr, gain_ptr, result_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    there = at < width
    x = tl.load(x_ptr + row * width + at, mask=there, other=0.0)
    x *= 1.0 / tl.sqrt_rn(tl.sum(x * x) / width + eps)
    if gain_ptr is not None:
        x *= tl.load(gain_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(result_ptr + row * width + at, x, mask=there)


@triton.jit
def _silu_mul_kernel(x_ptr, result_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    gate = tl.load(x_ptr + row * 2 * width + at, mask=there, other=0.0)
    up = tl.load(x_ptr + row * 2 * width + width + at, mask=there, other=0.0)
    tl.store(result_ptr + row * width + at, gate / (1.0 + tl.exp(-gate)) * up, mask=there)
