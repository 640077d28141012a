"""Sparsified model classes, one set a family, registered with transformers' Auto classes on import."""

from larosa.models.families import Family, family_of, register_families
from larosa.models.modules import SparseLinear, TopK, selectors, set_keep_counts, sparsify_layers

register_families()

__all__ = [
    "Family",
    "SparseLinear",
    "TopK",
    "family_of",
    "selectors",
    "set_keep_counts",
    "sparsify_layers",
]
