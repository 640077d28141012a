"""Orthogonal bases for the residual stream, and their merge into the weights."""

from larosa.rotation.adapters import LayerFrames, connect
from larosa.rotation.bases import LayerBases, output_aware, principal_basis, random_basis, reader_gram
from larosa.rotation.fisher import UnitFisher
from larosa.rotation.merge import Adapters, merge_bases

__all__ = [
    "Adapters",
    "LayerBases",
    "LayerFrames",
    "UnitFisher",
    "connect",
    "merge_bases",
    "output_aware",
    "principal_basis",
    "random_basis",
    "reader_gram",
]
