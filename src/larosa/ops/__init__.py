"""Operations on activations, one idea a file, each with a plain PyTorch form.

`keep_top_k` and `drop_up_to` zero what is dropped, and run everywhere. The operators of a decoding step,
`torch.ops.larosa.*`, skip it instead: their schemas stand beside their references here, their kernels in one
folder a device.
"""

# The first line declares the operators, the next two implement them.
from larosa.ops import (
    above_linear,
    adapter,
    attend,
    embed,
    greedy,
    linear,
    low_bit,
    low_bit_site,
    norm,
    select,
    top_k_linear,
)
from larosa.ops import backend as _gpu  # noqa: F401
from larosa.ops.cpu import kernels as _cpu  # noqa: F401
from larosa.ops.linear import column_major
from larosa.ops.threshold import drop_up_to
from larosa.ops.top_k import keep_top_k

__all__ = [
    "above_linear",
    "adapter",
    "attend",
    "column_major",
    "drop_up_to",
    "embed",
    "greedy",
    "keep_top_k",
    "linear",
    "low_bit",
    "low_bit_site",
    "norm",
    "select",
    "top_k_linear",
]
