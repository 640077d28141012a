"""Operations on activations, one a file, each with a plain PyTorch form."""

from larosa.ops.threshold import drop_up_to
from larosa.ops.top_k import keep_top_k

__all__ = ["drop_up_to", "keep_top_k"]
