"""Orthogonal bases for the residual stream, and their merge into the weights."""

from larosa.rotation.bases import LayerBases, principal_basis, random_basis
from larosa.rotation.merge import Adapters, merge_bases

__all__ = ["Adapters", "LayerBases", "merge_bases", "principal_basis", "random_basis"]
