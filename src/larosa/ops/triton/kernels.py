"""The operators by Triton, in one place."""

import sys
from typing import Any

import torch

from larosa.ops.site import site_by_parts
from larosa.ops.triton.attend import attend
from larosa.ops.triton.linear import linear, sparse_linear
from larosa.ops.triton.norm import rms_norm, silu_mul
from larosa.ops.triton.select import rms_norm_top_k, silu_mul_top_k, top_k

__all__ = [
    "attend",
    "linear",
    "rms_norm",
    "rms_norm_top_k",
    "silu_mul",
    "silu_mul_top_k",
    "site",
    "sparse_linear",
    "top_k",
]


def site(*arguments: Any, **options: Any) -> torch.Tensor:
    """See `site_reference`: one launch a part."""
    return site_by_parts(sys.modules[__name__], *arguments, **options)
