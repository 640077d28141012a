"""The conversion, from what is asked for to the converted model or checkpoint."""

from larosa.conversion.options import ConversionOptions, ConversionSettings
from larosa.conversion.pipeline import Sparsified, check_reach, convert, sparsify

__all__ = ["ConversionOptions", "ConversionSettings", "Sparsified", "check_reach", "convert", "sparsify"]
