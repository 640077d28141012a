"""Orthogonal bases for the residual stream, and their merge into the weights."""

from larosa.rotation.adapters import Adapter, LayerFrames, connect, make_adapter, usual_format
from larosa.rotation.bases import LayerBases, output_aware, principal_basis, random_basis, reader_gram
from larosa.rotation.fisher import UnitFisher
from larosa.rotation.merge import Adapters, merge_bases

__all__ = [
    "Adapter",
    "Adapters",
    "LayerBases",
    "LayerFrames",
    "UnitFisher",
    "connect",
    "make_adapter",
    "merge_bases",
    "output_aware",
    "principal_basis",
    "random_basis",
    "reader_gram",
    "usual_format",
]
