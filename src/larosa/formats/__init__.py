"""How weights, adapters, and keys and values are stored: as they are, or by few bits.

Nothing outside this room packs or unpacks them, or counts their bytes. A new format of weights is a class in
`columns.py`, and a name in `quantization.py`.
"""

from larosa.formats.adapters import Adapter, AdapterFormat
from larosa.formats.columns import FORMATS, GROUPS, SCALE_DTYPE, ColumnFormat, Int4, Int5, Int6, Int8
from larosa.formats.keys_values import CacheDtype, CacheFormat
from larosa.formats.quantization import Quantization, Quantizer, WeightFormat

__all__ = [
    "FORMATS",
    "GROUPS",
    "SCALE_DTYPE",
    "Adapter",
    "AdapterFormat",
    "CacheDtype",
    "CacheFormat",
    "ColumnFormat",
    "Int4",
    "Int5",
    "Int6",
    "Int8",
    "Quantization",
    "Quantizer",
    "WeightFormat",
]
