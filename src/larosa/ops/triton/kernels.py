"""The operators by Triton, in one place."""

from larosa.ops.embed import embed_reference as embed
from larosa.ops.greedy import greedy_reference as greedy
from larosa.ops.triton.attend import attend
from larosa.ops.triton.linear import linear, sparse_linear
from larosa.ops.triton.low_bit import low_bit_linear, low_bit_site
from larosa.ops.triton.norm import rms_norm, silu_mul
from larosa.ops.triton.select import above, rms_norm_above, rms_norm_top_k, silu_mul_above, silu_mul_top_k, top_k
from larosa.ops.triton.top_k_linear import (
    above_linear,
    rms_norm_above_linear,
    rms_norm_above_swiglu,
    rms_norm_top_k_linear,
    rms_norm_top_k_swiglu,
    top_k_linear,
)

__all__ = [
    "above",
    "above_linear",
    "attend",
    "embed",
    "greedy",
    "linear",
    "low_bit_linear",
    "low_bit_site",
    "rms_norm",
    "rms_norm_above",
    "rms_norm_above_linear",
    "rms_norm_above_swiglu",
    "rms_norm_top_k",
    "rms_norm_top_k_linear",
    "rms_norm_top_k_swiglu",
    "silu_mul",
    "silu_mul_above",
    "silu_mul_top_k",
    "sparse_linear",
    "top_k",
    "top_k_linear",
]
