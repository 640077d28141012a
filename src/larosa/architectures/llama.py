"""Llama 1 to 3.x and everything that ships as `llama`: MHA or GQA, optional biases, tied or untied head."""

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from larosa.architectures.base import Architecture

LLAMA = Architecture(
    model_type="llama",
    config_class=LlamaConfig,
    model_class=LlamaModel,
    causal_lm_class=LlamaForCausalLM,
)
