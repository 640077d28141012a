"""The transformers classes of the sparsified families: Larosa{Llama,Mistral,...}{Config,Model,ForCausalLM}.

They are thin subclasses of the family's own classes: the dense model is built first and its layers are
then turned into sparsified ones as the configuration's `larosa` block says. Being model types of their
own, checkpoints cannot load as something else by accident.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from larosa.architectures import ARCHITECTURES, Architecture, find_architecture
from larosa.config import LarosaConfig
from larosa.errors import LarosaError
from larosa.migrations import check_weights_follow, loading_weights, migrate_weights
from larosa.models.modules import sparsify_layers

#: transformers shows what stands before "--" when a checkpoint of an unknown type with an `auto_map` is
#: loaded: the one place where a checkpoint can say what it needs. It names no repository, so nothing can
#: be fetched or run, whatever `trust_remote_code` says.
_LOAD_HINT = (
    "This checkpoint needs larosa: run `pip install larosa` and `import larosa` before loading it; no remote code"
)


@dataclass(frozen=True)
class Family:
    """The registered classes of one sparsified family."""

    architecture: Architecture
    config_class: type[Any]
    model_class: type[Any]
    causal_lm_class: type[Any]

    def adopt(self, model: Any, block: LarosaConfig) -> None:
        """Turn a dense causal language model of this family into a sparsified one, in place.

        Weights stay as they are; adapters come uninitialised. The configuration object passed to the
        model's constructor is left alone: the model and its submodules get a copy.
        """
        dense, config = model.config, copy.deepcopy(model.config)
        config.__class__ = self.config_class
        config.larosa = block.model_dump(mode="json")
        config.tie_word_embeddings = False
        config.architectures = [self.causal_lm_class.__name__]
        config.auto_map = self._auto_map()
        for module in model.modules():
            if getattr(module, "config", None) is dense:
                module.config = config
        # The base model keeps its dense class, as it has in a loaded checkpoint: only its layers differ.
        model.__class__ = self.causal_lm_class
        model.all_tied_weights_keys = {}
        sparsify_layers(model, self.architecture, block)

    def _auto_map(self) -> dict[str, str]:
        """The `auto_map` of saved checkpoints, which tells whoever loads one without larosa what to do."""
        return {
            auto: f"{_LOAD_HINT}--larosa.{cls.__name__}"
            for auto, cls in (
                ("AutoConfig", self.config_class),
                ("AutoModel", self.model_class),
                ("AutoModelForCausalLM", self.causal_lm_class),
            )
        }


class _SparseConfig:
    """Mixed into a family's configuration: validates the `larosa` block as soon as it is read."""

    larosa: dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        # transformers builds a configuration without arguments to find its defaults.
        if self.larosa is not None:
            LarosaConfig.parse(self.larosa)


class _SparseModel:
    """Mixed into a family's models: sparsifies the layers that the dense constructor has built."""

    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - transformers reads it as a class attribute

    def __init__(self, config: Any) -> None:
        block = LarosaConfig.parse(config.larosa)
        check_weights_follow(config.larosa)
        if config.tie_word_embeddings:
            raise LarosaError("config.json, key 'tie_word_embeddings': must be false, rotation unties them")
        if getattr(config, "quantization_config", None) is not None:
            # Quantizers replace every linear, by its class, and with it what sparsifies its input.
            raise LarosaError("a converted model is not quantized as it is loaded: leave quantization_config out")
        super().__init__(config)  # type: ignore[call-arg]
        sparsify_layers(self, find_architecture(config.model_type), block)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`; a checkpoint of an older format comes out in that of now."""
        with loading_weights():
            loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        migrate_weights(model, find_architecture(model.config.model_type))
        return loaded


def _make_family(architecture: Architecture) -> Family:
    prefix = "Larosa" + architecture.causal_lm_class.__name__.removesuffix("ForCausalLM")
    module = __name__.rpartition(".")[0]

    def subclass(base: type, mixin: type, suffix: str, **namespace: Any) -> type:
        name = prefix + suffix
        namespace |= {"__module__": module, "__doc__": f"{base.__name__}, sparsified by larosa."}
        return type(name, (mixin, base), namespace)

    config_class: type[Any] = strict(
        subclass(
            architecture.config_class,
            _SparseConfig,
            "Config",
            model_type=architecture.converted_model_type,
            larosa=None,
            __annotations__={"larosa": dict[str, Any] | None},
        )
    )
    shared = {"config_class": config_class, "__annotations__": {"config": config_class}}
    return Family(
        architecture=architecture,
        config_class=config_class,
        model_class=subclass(architecture.model_class, _SparseModel, "Model", **shared),
        causal_lm_class=subclass(architecture.causal_lm_class, _SparseModel, "ForCausalLM", **shared),
    )


_FAMILIES = {a.model_type: _make_family(a) for a in ARCHITECTURES.values()}


def family_of(architecture: Architecture) -> Family:
    """The sparsified classes of a family."""
    return _FAMILIES[architecture.model_type]


def register_families() -> None:
    """Make the Auto classes, pipelines and serving tools find the sparsified families."""
    package = sys.modules[__name__.rpartition(".")[0]]
    for family in _FAMILIES.values():
        model_type = family.architecture.converted_model_type
        AutoConfig.register(model_type, family.config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.model_class, exist_ok=True)
        AutoModelForCausalLM.register(family.config_class, family.causal_lm_class, exist_ok=True)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = family.causal_lm_class.__name__
        for cls in (family.config_class, family.model_class, family.causal_lm_class):
            setattr(package, cls.__name__, cls)
            # `transformers serve` and vLLM's transformers backend look classes up by name here.
            setattr(transformers, cls.__name__, cls)
