"""The operators on CUDA by the kernels in `source/`: each one launch, or several where one would not be faster.

Some read early, before the launches in front of them have finished, what is not to be written there: each says what.
That holds under `launch.early_launches` alone; otherwise a kernel begins when all before it have finished.
"""

from larosa.ops.cuda.attend import attend
from larosa.ops.cuda.elementwise import embed, greedy, rms_norm, silu_mul
from larosa.ops.cuda.linear import linear, sparse_linear
from larosa.ops.cuda.low_bit import low_bit_linear, low_bit_site
from larosa.ops.cuda.select import above, rms_norm_above, rms_norm_top_k, silu_mul_above, silu_mul_top_k, top_k
from larosa.ops.cuda.top_k_linear import (
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
