"""The conversion, from what is asked for to the converted model or checkpoint."""

from larosa.conversion.pipeline import Sparsified, check_reach, convert, sparsify

__all__ = [
    "Sparsified",
    "check_reach",
    "convert",
    "sparsify",
]
