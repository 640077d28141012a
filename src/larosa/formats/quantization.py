"""What of a model is stored by few bits: the `quantization` block of a sparsified model's settings."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from larosa.errors import LarosaError
from larosa.formats.columns import FORMATS, ColumnFormat, Int4, check_group


class WeightFormat(StrEnum):
    """What linears are stored as: the model's own dtype (`full`), or few bits with scales, by a name of `FORMATS`.

    `int4+4` is two planes of `int4`, of which a token reads none, the first or both for each entry of an input.
    """

    FULL = "full"
    INT8 = "int8"
    INT4_4 = "int4+4"
    INT6 = "int6"
    INT5 = "int5"
    INT4 = "int4"

    @property
    def planes(self) -> int:
        """How many columns an entry of a linear's input has."""
        return 2 if self is WeightFormat.INT4_4 else 1

    @property
    def columns(self) -> type[ColumnFormat]:
        """What each of them is stored in, of a format of few bits."""
        return Int4 if self is WeightFormat.INT4_4 else FORMATS[self]

    @property
    def usual_group(self) -> int:
        """Outputs that share a scale where the user does not say, of a format of few bits."""
        return 64 if self is WeightFormat.INT4_4 else self.columns.usual_group

    @property
    def bits(self) -> int:
        """Of a weight's codes, of a format of few bits."""
        return self.planes * self.columns.bits


#: All but `full`, in the order in which messages list them.
FEW_BITS = tuple(form for form in WeightFormat if form is not WeightFormat.FULL)

_FEW_BITS = "of weights of few bits: add --weights " + ", ".join(FEW_BITS)


class Quantizer(StrEnum):
    """How whole numbers are found: each weight rounded to the nearest (`rtn`), or with what its rounding does to the

    outputs made up for by the columns that follow (`gptq`, which needs calibration).
    """

    RTN = "rtn"
    GPTQ = "gptq"


class Quantization(BaseModel):
    """What the decoder's linears and the language-model head are stored as; one of them at least by few bits.

    `quantizer` says how the linears' codes came about, and is null where they are `full`; the head is always rounded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: WeightFormat = WeightFormat.FULL
    head: WeightFormat = Field(default=WeightFormat.FULL, validate_default=True)
    group: Annotated[int, AfterValidator(check_group)]
    quantizer: Quantizer | None = Field(default=None, validate_default=True)

    @field_validator("head")
    @classmethod
    def _check_head(cls, value: WeightFormat, info: ValidationInfo) -> WeightFormat:
        if value is WeightFormat.FULL and info.data.get("weights") is WeightFormat.FULL:
            raise ValueError("nothing is stored by few bits: leave 'quantization' out")
        weights = info.data.get("weights")
        if value.planes > 1 and weights is not None and weights.planes == 1:
            raise ValueError(f"'{value}' goes with weights '{value}'")
        return value

    @field_validator("quantizer")
    @classmethod
    def _check_quantizer(cls, value: Quantizer | None, info: ValidationInfo) -> Quantizer | None:
        weights = info.data.get("weights")
        if value is Quantizer.GPTQ and weights is not None and weights.planes > 1:
            raise ValueError(f"weights '{weights}' are rounded plane by plane, by 'rtn'")
        if weights is not None and (value is None) != (weights is WeightFormat.FULL):
            raise ValueError(f"weights '{weights}' " + ("need one" if value is None else "have none"))
        return value

    @property
    def linear_format(self) -> ColumnFormat | None:
        """Of the decoder's linears; None where they are in the model's own dtype."""
        return _format(self.weights, self.group)

    @property
    def head_format(self) -> ColumnFormat | None:
        """Of the language-model head; None where it is in the model's own dtype."""
        return _format(self.head, self.group)

    @classmethod
    def complete(
        cls, weights: WeightFormat | None, head: WeightFormat | None, group: int | None, quantizer: Quantizer | None
    ) -> Quantization | None:
        """Check the user's options and take the rest from what suits the format; None where nothing is quantized.

        Raises:
            LarosaError: an option that means nothing without another.
        """
        weights = weights or WeightFormat.FULL
        full = weights is WeightFormat.FULL
        if head is None:
            head = weights if full or weights.planes > 1 else WeightFormat.INT8
        if head.planes > weights.planes:
            raise LarosaError(f"--head {head} goes with --weights {head}: thresholds say what is read of both")
        if weights.planes > 1 and quantizer is Quantizer.GPTQ:
            raise LarosaError(f"--weights {weights} are rounded plane by plane: --quantizer rtn, or leave it out")
        if full and quantizer is not None:
            raise LarosaError(f"--quantizer {quantizer} is {_FEW_BITS}")
        if full and head is WeightFormat.FULL:
            if group is not None:
                raise LarosaError(f"--weight-group {group} is {_FEW_BITS}")
            return None
        return cls(
            weights=weights,
            head=head,
            group=(head if full else weights).usual_group if group is None else check_group(group),
            quantizer=None if full else quantizer or (Quantizer.GPTQ if weights.planes == 1 else Quantizer.RTN),
        )

    @classmethod
    def choices(
        cls, head: WeightFormat | None, group: int | None, quantizer: Quantizer | None, planes: bool
    ) -> dict[WeightFormat, Quantization | None]:
        """What `complete` makes of the other options for each format of weights, in the order to try them in.

        Where a model can have `planes` they come first: a token reads of them what it needs, and they mostly win. Then
        comes the one of fewest bits. Group and quantizer are of weights of few bits: `full` ones go without.
        """
        chosen: dict[WeightFormat, Quantization | None] = {
            weights: cls.complete(weights, head, group, None if weights.planes > 1 else quantizer)
            for weights in sorted(FEW_BITS, key=lambda form: (-form.planes, form.bits))
            if (planes or weights.planes == 1) and (head is None or head.planes <= weights.planes)
        }
        if head is not None and head.planes > 1:
            return chosen
        of_head = None if head in (None, WeightFormat.FULL) else group
        return {**chosen, WeightFormat.FULL: cls.complete(WeightFormat.FULL, head, of_head, None)}


def _format(name: WeightFormat, group: int) -> ColumnFormat | None:
    return None if name is WeightFormat.FULL else name.columns(group, name.planes)
