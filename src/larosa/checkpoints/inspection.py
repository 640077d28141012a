"""What a model keeps, skips and costs, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from larosa.checkpoints.io import load_config
from larosa.sparsity.report import Inspection, inspect_config


def inspect(model: Any, *, trust_remote_code: bool = False) -> Inspection:
    """Report sizes, counts, bytes and FLOPs of a dense or converted model.

    Args:
        model: a loaded model, or the folder or hub name of a checkpoint, of which only the
            configuration is read.

    Raises:
        LarosaError: no such checkpoint, or an unsupported family.
    """
    if isinstance(model, (str, Path)):
        return inspect_config(load_config(str(model), trust_remote_code=trust_remote_code))
    return inspect_config(model.config)
