"""Everything about a sparsified model that is not a weight: the `larosa` block of `config.json`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from larosa.config.choices import (
    GATE,
    SITES,
    Budget,
    Compensation,
    Covariance,
    Method,
    Prefill,
    Recipe,
    Rotation,
    RotationObjective,
    Score,
    Search,
    Selection,
)
from larosa.config.migrations import FORMAT_VERSION, migrate_settings
from larosa.errors import LarosaError
from larosa.formats import AdapterFormat, ColumnFormat, Quantization


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PerSite(_Block):
    """One number for each activation site."""

    h1: float = 1.0
    h2: float = 1.0
    h3: float = 1.0
    h4: float = 1.0

    def __getitem__(self, site: str) -> float:
        return float(getattr(self, site))


class KeepCounts(_Block):
    """How many entries each site keeps per token: one list a site, one count a layer."""

    h1: list[int] = Field(min_length=1)
    h2: list[int] = Field(min_length=1)
    h3: list[int] = Field(min_length=1)
    h4: list[int] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if len({len(self[site]) for site in SITES}) != 1:
            raise ValueError("every site needs one count for each layer")
        if any(count < 0 for site in SITES for count in self[site]):
            raise ValueError("counts cannot be negative")
        return self

    def __getitem__(self, site: str) -> list[int]:
        counts: list[int] = getattr(self, site)
        return counts


_Site = Literal["h1", "h2", "h3", "h4", "gate"]
_Magnitude = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class HeadThreshold(_Block):
    """The same as `Thresholds` for the one input of the language-model head."""

    value: _Magnitude = 0.0
    dropped: _Share = 0.0


class Thresholds(_Block):
    """Magnitudes up to which a site's entries are dropped: one list a site, one number a layer.

    `dropped` is the share of the calibration tokens' entries that each threshold drops. What it drops of
    another token differs from token to token. `head` is null but for a head in planes.
    """

    values: dict[_Site, list[_Magnitude]]
    dropped: dict[_Site, list[_Share]]
    head: HeadThreshold | None = None

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.values.keys() != self.dropped.keys():
            raise ValueError("'values' and 'dropped' must have the same sites")
        lengths = {len(numbers) for part in (self.values, self.dropped) for numbers in part.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError("every site needs one number for each layer")
        return self

    def __getitem__(self, site: str) -> list[float]:
        return self.values[site]  # type: ignore[index]


class CalibrationRecord(_Block):
    """What the model was calibrated on; kept for the record, never read again."""

    source: str
    num_sequences: int = Field(gt=0)
    sequence_length: int = Field(gt=0)
    seed: int


class RecoveryRecord(_Block):
    """What the model was trained on after conversion; kept for the record, never read again."""

    source: str
    num_sequences: int = Field(gt=0)
    sequence_length: int = Field(gt=0)
    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    seed: int


class Settings(_Block):
    """How a model is sparsified: what a conversion does, and what its result records of that.

    Of `alphas`, `covariance`, `rotation_objective`, `quantization` and `calibration` None stands where nothing needs
    the thing.
    """

    method: Method = Method.LAROSA
    recipe: Recipe
    sparsity: float = Field(ge=0, lt=1)
    budget: Budget
    alphas: PerSite | None = None
    rotation: Rotation
    layers_per_rotation: int = 1
    covariance: Covariance | None = None
    rotation_objective: RotationObjective | None = None
    value_rotation: bool = False
    score: Score = Score.MAGNITUDE
    search: Search
    compensation: Compensation = Compensation.NONE
    quantization: Quantization | None = None
    prefill: Prefill = Prefill.SPARSE
    dense_first_token: bool = False
    calibration: CalibrationRecord | None = None

    @field_validator("layers_per_rotation")
    @classmethod
    def _check_layers_per_rotation(cls, value: int, info: ValidationInfo) -> int:
        return check_layers_per_rotation(value, info.data.get("rotation", Rotation.LAYER))

    @field_validator("score")
    @classmethod
    def _check_score(cls, value: Score, info: ValidationInfo) -> Score:
        method = info.data.get("method")
        if method in (Method.TEAL, Method.CATS) and value is not Score.MAGNITUDE:
            raise ValueError(f"method '{method}' compares magnitudes")
        return value

    @field_validator("quantization")
    @classmethod
    def _check_quantization(cls, value: Quantization | None, info: ValidationInfo) -> Quantization | None:
        method = info.data.get("method")
        return value if method is None else check_quantization(value, method)


class LarosaConfig(Settings):
    """A sparsified model's settings, as stored under `larosa` in its `config.json`.

    `keep` (counts of entries) or `thresholds` is what the model runs by, one of them being null; the
    other keys say how it came about, but for `prefill` and `dense_first_token`, which say what tokens stay
    dense, and `quantization`, which says what is stored by few bits (null: nothing). `alphas`, `covariance` and
    `rotation_objective` are null where the method has none. With a `score` other than magnitude every site has a
    vector in the checkpoint.
    """

    format_version: int = FORMAT_VERSION
    larosa_version: str
    keep: KeepCounts | None = Field(default=None, validate_default=True)
    thresholds: Thresholds | None = Field(default=None, validate_default=True)
    adapters: AdapterFormat = AdapterFormat.FULL
    recovery: RecoveryRecord | None = None

    @field_validator("keep", "thresholds")
    @classmethod
    def _check_selection(cls, value: Any, info: ValidationInfo) -> Any:
        method = info.data.get("method")
        if method is None:  # invalid itself, and reported first
            return value
        of_field = Selection.TOP_K if info.field_name == "keep" else Selection.THRESHOLD
        if value is not None and of_field not in method.selections:
            raise ValueError(f"method '{method}' has none")
        if value is None and of_field is method.selections[-1] and info.data.get("keep") is None:
            raise ValueError(f"method '{method}' needs it" + (", or 'keep'" if len(method.selections) > 1 else ""))
        if info.field_name == "thresholds" and value is not None and info.data.get("keep") is not None:
            raise ValueError("give either 'keep' or 'thresholds', not both")
        if isinstance(value, Thresholds) and set(value.values) != set(method.sites):
            raise ValueError(f"method '{method}' needs exactly the sites {', '.join(method.sites)}")
        if info.field_name == "thresholds" and "score" in info.data:
            selection = Selection.TOP_K if value is None else Selection.THRESHOLD
            quantization: Quantization | None = info.data.get("quantization")
            check_planes(quantization, selection, info.data["score"])
            in_planes = quantization is not None and quantization.head.planes > 1
            if isinstance(value, Thresholds) and (value.head is not None) != in_planes:
                raise ValueError("a head in planes needs 'head'" if in_planes else "'head' is of a head in planes")
        return value

    @field_validator("adapters")
    @classmethod
    def _check_adapters(cls, value: AdapterFormat, info: ValidationInfo) -> AdapterFormat:
        return check_adapters(value, info.data.get("rotation", Rotation.LAYER))

    @property
    def layers(self) -> int:
        """The number of layers that the counts or thresholds are for."""
        first: str = self.method.sites[0]
        return len(self.limits[first])

    @property
    def selection(self) -> Selection:
        """How the model decides what is kept."""
        return Selection.TOP_K if self.thresholds is None else Selection.THRESHOLD

    @property
    def limits(self) -> KeepCounts | Thresholds:
        """What the model runs by."""
        limits = self.keep if self.thresholds is None else self.thresholds
        assert limits is not None, "validated"
        return limits

    @property
    def linear_format(self) -> ColumnFormat | None:
        """What the decoder's linears are stored in; None for the model's own dtype."""
        return None if self.quantization is None else self.quantization.linear_format

    @property
    def planes(self) -> int:
        """How many columns of the decoder's linears an entry of an activation may read."""
        return 1 if self.linear_format is None else self.linear_format.planes

    @property
    def head_format(self) -> ColumnFormat | None:
        """The same of the language-model head."""
        return None if self.quantization is None else self.quantization.head_format

    @classmethod
    def parse(cls, block: Any) -> LarosaConfig:
        """Validate the `larosa` block of a `config.json`, of this format version or an older one.

        Raises:
            LarosaError: the block is missing, of a newer format, or has an unknown or invalid key.
        """
        if not isinstance(block, dict):
            raise LarosaError("config.json has no 'larosa' block: this is not a converted checkpoint")
        block = migrate_settings(block)
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise LarosaError(f"config.json, key 'larosa.{key}': {first['msg']}") from None


def check_sparsity(sparsity: float) -> float:
    """Return `sparsity` if it is a fraction in [0, 1).

    Raises:
        LarosaError: it is not (percentages are a common slip).
    """
    if not 0 <= sparsity < 1:
        raise LarosaError(f"sparsity {sparsity:g} is outside [0, 1): give a fraction, 0.5 for 50%")
    return sparsity


def check_layers_per_rotation(layers: int, rotation: Rotation = Rotation.LAYER) -> int:
    """Return `layers` if so many consecutive ones can share a basis with this rotation.

    Raises:
        LarosaError: there must be one at least, and only with rotation `layer` can there be more.
    """
    if layers < 1:
        raise LarosaError(f"{layers} layers per rotation: give at least 1")
    if layers > 1 and rotation is not Rotation.LAYER:
        raise LarosaError(f"{layers} layers per rotation: only rotation 'layer' has a choice, '{rotation}' has none")
    return layers


def check_adapters(adapters: AdapterFormat, rotation: Rotation) -> AdapterFormat:
    """Return `adapters` if this rotation can have them stored so.

    Raises:
        LarosaError: it has none.
    """
    if adapters is not AdapterFormat.FULL and not rotation.has_adapters:
        raise LarosaError(f"adapters '{adapters}': rotation '{rotation}' has none: leave it out")
    return adapters


def check_quantization(quantization: Quantization | None, method: Method) -> Quantization | None:
    """Return `quantization` if a model sparsified by this method can be stored so.

    Raises:
        LarosaError: it skips rows of a matrix, which formats of few bits store by columns.
    """
    if quantization is not None and quantization.linear_format is not None and GATE in method.sites:
        raise LarosaError(
            f"method '{method}' skips rows of weights, which {quantization.weights} stores by columns: leave it out"
        )
    return quantization


def check_planes(quantization: Quantization | None, selection: Selection, score: Score) -> None:
    """Refuse weights in planes to a model that has no thresholds on scores, by which an entry's planes are told apart.

    Raises:
        LarosaError: the message says what it lacks.
    """
    if quantization is None or quantization.weights.planes == 1:
        return
    if selection is not Selection.THRESHOLD or not score.has_vectors:
        raise LarosaError(
            f"weights '{quantization.weights}': thresholds on scores say what is read of them: "
            "--selection threshold --score fisher, the defaults"
        )
