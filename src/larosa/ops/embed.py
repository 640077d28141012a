"""The row of the embedding that a step starts from. For a GPU, where looking up, widening and copying are launches."""

from __future__ import annotations

import torch

from larosa.ops.schema import define


@define("embed(Tensor embedding, Tensor tokens) -> Tensor")
def _embed(embedding: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return embedding.new_empty(len(tokens), embedding.shape[1], dtype=torch.float32)


def embed_reference(embedding: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The embeddings of tokens.

    Args:
        embedding: [vocabulary, D], contiguous, any float dtype.
        tokens: [B] int64, less than `vocabulary`. The first token stands in for `NO_TOKEN`, after which the host stops.

    Returns:
        [B, D] float32.
    """
    return torch.embedding(embedding, tokens.clamp(min=0)).float()
