"""What a divergence from the dense model means, in words."""

from __future__ import annotations

#: Nats per token beyond which a converted model should not be used without looking at what it writes.
BAR = 0.1

#: What llama.cpp's quantisations of Llama-3-8B lose by the same measure (its tools/perplexity/README.md).
Q6_K, Q4_K_M = 0.0055, 0.031


def verdict(kl_divergence: float) -> str:
    """One sentence on a KL divergence in nats per token."""
    if kl_divergence <= Q6_K:
        return f"As close to the dense model as 6-bit quantisation (Q6_K of Llama-3-8B: {Q6_K})."
    if kl_divergence <= Q4_K_M:
        return f"As close to the dense model as good 4-bit quantisation (Q4_K_M of Llama-3-8B: {Q4_K_M})."
    if kl_divergence <= BAR:
        return f"Further from the dense model than good 4-bit quantisation (Q4_K_M of Llama-3-8B: {Q4_K_M})."
    return (
        f"Warning: a divergence above {BAR} shows in the text: facts and grammar suffer. "
        f"Lower --sparsity, or let --max-kl {BAR} find the highest one that stays below."
    )
