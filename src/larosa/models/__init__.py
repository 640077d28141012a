"""Sparsified model classes, one set a family, registered with transformers' Auto classes on import."""

from larosa.models.empty import empty_model, model_without_memory, take_memory
from larosa.models.families import Family, family_of, note_tie, register_families
from larosa.models.head import head_selector, quantize_head
from larosa.models.modules import (
    Int8Adapter,
    SparseActivation,
    SparseLinear,
    adapter_storage,
    column_norms,
    quantize_layer,
    selectors,
    set_adapter,
    set_keep_counts,
    set_planes,
    set_scores,
    set_thresholds,
    sparsify_layers,
    thresholds_of,
)
from larosa.models.quantized import QuantizedLinear
from larosa.models.selectors import DenseTokens, Selector, Threshold, TopK

__all__ = [
    "DenseTokens",
    "Family",
    "Int8Adapter",
    "QuantizedLinear",
    "Selector",
    "SparseActivation",
    "SparseLinear",
    "Threshold",
    "TopK",
    "adapter_storage",
    "column_norms",
    "empty_model",
    "family_of",
    "head_selector",
    "model_without_memory",
    "note_tie",
    "quantize_head",
    "quantize_layer",
    "register_families",
    "selectors",
    "set_adapter",
    "set_keep_counts",
    "set_planes",
    "set_scores",
    "set_thresholds",
    "sparsify_layers",
    "take_memory",
    "thresholds_of",
]

register_families()
