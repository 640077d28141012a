"""How the weights of linears are stored: as they are, or by few bits. Nothing outside this room tells formats apart.

A new format is a class in `columns.py`, and a name in `quantization.py`.
"""

from larosa.formats.columns import GROUPS, SCALE_DTYPE, ColumnFormat, Int4, Int8
from larosa.formats.quantization import Quantization, Quantizer, WeightFormat

__all__ = ["GROUPS", "SCALE_DTYPE", "ColumnFormat", "Int4", "Int8", "Quantization", "Quantizer", "WeightFormat"]
