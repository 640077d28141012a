"""Operations on activations, one a file, each with a plain PyTorch form."""

from larosa.ops.top_k import keep_top_k

__all__ = ["keep_top_k"]
