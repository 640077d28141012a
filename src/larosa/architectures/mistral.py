"""Mistral 7B and its fine-tunes: GQA, optional sliding window."""

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel

from larosa.architectures.base import Architecture

MISTRAL = Architecture(
    model_type="mistral",
    config_class=MistralConfig,
    model_class=MistralModel,
    causal_lm_class=MistralForCausalLM,
    window=lambda config, layer: config.sliding_window,
)
