"""The language-model head of few bits, whose input is sparse where it is stored in planes."""

from __future__ import annotations

from typing import Any

from larosa.architectures import Architecture
from larosa.formats import ColumnFormat
from larosa.models.quantized import QuantizedLinear, quantized_like
from larosa.models.selectors import Threshold


def quantize_head(model: Any, architecture: Architecture, form: ColumnFormat, threshold: float = 0.0) -> None:
    """Put a head of few bits in the place of a model's, which a base model does not have.

    Codes, scales and, in planes, the scores of its input come uninitialised. No token reads that input but this one: a
    head leaves none dense.
    """

    def make(head: Any) -> QuantizedLinear:
        quantized = quantized_like(form, head)
        if form.planes > 1:
            scores = head.weight.new_empty(form.planes * head.in_features)
            quantized.selector = Threshold(threshold, score=scores, planes=form.planes)
        return quantized

    architecture.replace_head(model, make)


def head_selector(model: Any, architecture: Architecture) -> Threshold | None:
    """What says which entries a model's head reads; None where it reads all."""
    selector = getattr(architecture.head(model), "selector", None)
    return selector if isinstance(selector, Threshold) else None
