"""Qwen2 and Qwen2.5: GQA with biases on q, k and v."""

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from larosa.architectures.base import Architecture, window_by_layer_type

QWEN2 = Architecture(
    model_type="qwen2",
    config_class=Qwen2Config,
    model_class=Qwen2Model,
    causal_lm_class=Qwen2ForCausalLM,
    window=window_by_layer_type,
)
