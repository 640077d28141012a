"""Qwen3 (dense): per-head norms on q and k, heads that need not add up to the hidden size."""

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

from larosa.architectures.base import Architecture, window_by_layer_type

QWEN3 = Architecture(
    model_type="qwen3",
    config_class=Qwen3Config,
    model_class=Qwen3Model,
    causal_lm_class=Qwen3ForCausalLM,
    query_key_norm_names=("q_norm", "k_norm"),
    window=window_by_layer_type,
)
