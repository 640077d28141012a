"""The transformers classes of the sparsified families: Larosa{Llama,Mistral,...}{Config,Model,ForCausalLM}.

They are thin subclasses of the family's own classes: the dense model is built first and its layers are
then turned into sparsified ones as the configuration's `larosa` block says. Being model types of their
own, checkpoints cannot load as something else by accident.
"""

from __future__ import annotations

import copy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from larosa.architectures import ARCHITECTURES, Architecture, find_architecture
from larosa.config import LarosaConfig
from larosa.config.migrations import check_weights_follow, loading_weights, migrate_weights
from larosa.errors import LarosaError
from larosa.models.modules import sparsify_layers

#: The file beside a checkpoint's configuration that imports the classes from here, for `trust_remote_code=True`.
SHIM = Path(__file__).with_name("modeling_larosa.py")


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
        config.architectures = [self.causal_lm_class.__name__]
        for module in model.modules():
            if getattr(module, "config", None) is dense:
                module.config = config
        # The base model keeps its dense class, as it has in a loaded checkpoint: only its layers differ.
        model.__class__ = self.causal_lm_class
        note_tie(model, self.architecture)
        sparsify_layers(model, self.architecture, block)

    @property
    def auto_classes(self) -> dict[str, str]:
        """The names of the classes, by that of the Auto class that finds each."""
        return {
            "AutoConfig": self.config_class.__name__,
            "AutoModel": self.model_class.__name__,
            "AutoModelForCausalLM": self.causal_lm_class.__name__,
        }


def note_tie(model: Any, architecture: Architecture) -> None:
    """Tell transformers, which goes by it when it loads and saves, whether the head's weight is the embedding's."""
    weight = getattr(architecture.head(model), "weight", None)  # of few bits it has none
    tied = weight is architecture.embedding(model).weight
    model.config.tie_word_embeddings = tied
    if not tied:
        model.all_tied_weights_keys = {}


class _LoadedByShim:
    """Mixed into all classes: transformers marks those that a checkpoint's `auto_map` led to, and would from then on

    save this package's own source beside the model. The shim is saved instead, with the configuration.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Leave the class as it is."""


class _SparseConfig(_LoadedByShim):
    """Mixed into a family's configuration: validates the `larosa` block as soon as it is read."""

    larosa: dict[str, Any] | None
    auto_map: dict[str, str]
    model_type: str

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        # transformers builds a configuration without arguments to find its defaults.
        if self.larosa is not None:
            LarosaConfig.parse(self.larosa)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the shim that its `auto_map` names."""
        names = family_of(find_architecture(self.model_type)).auto_classes
        self.auto_map = {auto: f"{SHIM.stem}.{name}" for auto, name in names.items()}
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        shutil.copyfile(SHIM, Path(save_directory, SHIM.name))


class _SparseModel(_LoadedByShim):
    """Mixed into a family's models: sparsifies the layers that the dense constructor has built."""

    def __init__(self, config: Any) -> None:
        block = LarosaConfig.parse(config.larosa)
        check_weights_follow(config.larosa)
        if config.tie_word_embeddings and (block.rotation.rotates or block.head_format is not None):
            reason = "the rotation unties them" if block.rotation.rotates else "the head is stored by few bits"
            raise LarosaError(f"config.json, key 'tie_word_embeddings': must be false, for {reason}")
        if getattr(config, "quantization_config", None) is not None:
            # Quantizers know linears by their class: a SparseLinear would stay as it is, and the rest is untried.
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


def model_class(config: Any) -> type[Any]:
    """The causal language model of a supported configuration, dense or sparsified."""
    architecture = find_architecture(config.model_type)
    family = family_of(architecture)
    # By class: a configuration that was loaded keeps the dense model's type when its model is converted.
    return family.causal_lm_class if isinstance(config, family.config_class) else architecture.causal_lm_class


def register_families() -> None:
    """Make the Auto classes, pipelines and serving tools find the sparsified families.

    Importing larosa does so; vLLM does by the entry point `vllm.general_plugins`, in each of its processes.
    """
    package = sys.modules[__name__.rpartition(".")[0]]
    for family in _FAMILIES.values():
        model_type = family.architecture.converted_model_type
        AutoConfig.register(model_type, family.config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.model_class, exist_ok=True)
        AutoModelForCausalLM.register(family.config_class, family.causal_lm_class, exist_ok=True)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = family.causal_lm_class.__name__
        for cls in (family.config_class, family.model_class, family.causal_lm_class):
            setattr(package, cls.__name__, cls)
            if cls.__name__ not in package.__all__:  # what the shim imports
                package.__all__.append(cls.__name__)
            # `transformers serve` and vLLM's transformers backend look classes up by name here.
            for module in _transformers_modules():
                setattr(module, cls.__name__, cls)


def _transformers_modules() -> list[Any]:
    """The module `transformers`, and the one that others may hold from before: it can replace itself while imported."""
    held = (getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values()))
    found = {id(module): module for module in held if getattr(module, "__name__", None) == "transformers"}
    return list((found | {id(transformers): transformers}).values())
