"""SmolLM3: GQA, some layers without rotary embeddings."""

from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM, SmolLM3Model

from larosa.architectures.base import Architecture, window_by_layer_type

SMOLLM3 = Architecture(
    model_type="smollm3",
    config_class=SmolLM3Config,
    model_class=SmolLM3Model,
    causal_lm_class=SmolLM3ForCausalLM,
    rotary_flag_name="use_rope",
    window=window_by_layer_type,
)
