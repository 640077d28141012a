"""Model families: the only place that knows what a family calls its parts."""

from larosa.architectures.base import Architecture, Heads, cache_argument
from larosa.architectures.llama import LLAMA
from larosa.architectures.mistral import MISTRAL
from larosa.architectures.qwen2 import QWEN2
from larosa.architectures.qwen3 import QWEN3
from larosa.architectures.smollm3 import SMOLLM3
from larosa.errors import LarosaError

#: Every supported family by its `model_type`.
ARCHITECTURES = {a.model_type: a for a in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3)}

_NOT_YET = "needs an adapter of its own that does not exist yet"
_POST_NORM = "normalises after attention and MLP too, so its residual stream cannot be rotated exactly"
_REASONS = {
    "gemma": "scales embeddings and adds 1 to its norm gains, which the merge does not handle",
    "gemma2": _POST_NORM,
    "gemma3": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "phi3": f"fuses q/k/v and gate/up into one matrix each, and {_NOT_YET}",
    "granite": f"multiplies residuals, embeddings and logits by constants, and {_NOT_YET}",
    "gpt2": "uses LayerNorm, which subtracts the mean and so does not commute with a rotation",
    "gpt_neox": "uses LayerNorm, which subtracts the mean and so does not commute with a rotation",
    "opt": "uses LayerNorm, which subtracts the mean and so does not commute with a rotation",
    "mixtral": "is a mixture of experts, whose routed MLPs are not supported",
    "qwen2_moe": "is a mixture of experts, whose routed MLPs are not supported",
    "qwen3_moe": "is a mixture of experts, whose routed MLPs are not supported",
    "ministral": f"is a Mistral variant with mixed attention layers that {_NOT_YET}",
}


def find_architecture(model_type: str) -> Architecture:
    """The family of a dense model or of a sparsified one, by its config's `model_type`.

    Raises:
        LarosaError: the family is not supported; the message says why.
    """
    name = model_type.removeprefix("larosa_")
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    reason = _REASONS.get(name, "is not known to larosa")
    supported = ", ".join(ARCHITECTURES)
    raise LarosaError(f"model type '{model_type}' {reason}; supported: {supported}")


__all__ = ["ARCHITECTURES", "Architecture", "Heads", "cache_argument", "find_architecture"]
