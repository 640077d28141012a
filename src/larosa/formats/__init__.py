"""How the weights of linears are stored: as they are, or by few bits. Nothing outside this room tells formats apart.

A new format is a class here, a name in `WeightFormat` and an entry in `_FORMATS`.
"""

from __future__ import annotations

from enum import StrEnum

from larosa.formats.columns import GROUPS, SCALE_DTYPE, ColumnFormat, Int4, Int8, check_group

__all__ = ["GROUPS", "SCALE_DTYPE", "ColumnFormat", "Int4", "Int8", "WeightFormat", "check_group", "column_format"]


class WeightFormat(StrEnum):
    """What linears are stored as: the model's own dtype (`full`), or 8 or 4 bits with scales."""

    FULL = "full"
    INT8 = "int8"
    INT4 = "int4"


_FORMATS: dict[WeightFormat, type[ColumnFormat]] = {WeightFormat.INT8: Int8, WeightFormat.INT4: Int4}


def column_format(name: WeightFormat, group: int | None) -> ColumnFormat | None:
    """The format of this name; None where weights stay in the model's own dtype.

    Args:
        group: outputs that share a scale; None only where there are no scales.
    """
    if name not in _FORMATS:
        return None
    assert group is not None, "validated: there are scales"
    return _FORMATS[name](group)
