"""Everything about a sparsified model that is not a weight: the `larosa` block of `config.json`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from larosa.config.migrations import FORMAT_VERSION, migrate_settings
from larosa.errors import LarosaError
from larosa.formats import ColumnFormat, Quantization

#: The four activation sites of a decoder layer (paper, section 3.1): the inputs of
#: q/k/v (h1), of the attention output projection (h2), of gate/up (h3) and of down (h4).
SITES = ("h1", "h2", "h3", "h4")

#: The site of CATS: the activated gate of the MLP, whose zeros skip rows of up and columns of down.
GATE = "gate"


class Method(StrEnum):
    """How activations are sparsified: the paper's method and what it is compared with (its section 5)."""

    LAROSA = "larosa"
    TOPK = "topk"
    TEAL = "teal"
    CATS = "cats"

    @property
    def sites(self) -> tuple[str, ...]:
        """Where the method makes zeros, in the order that a layer computes them."""
        return (GATE,) if self is Method.CATS else SITES

    @property
    def selections(self) -> tuple[Selection, ...]:
        """How the method can decide what is kept, its own way first."""
        if self is Method.LAROSA:
            return Selection.TOP_K, Selection.THRESHOLD
        return (Selection.TOP_K,) if self is Method.TOPK else (Selection.THRESHOLD,)


class Selection(StrEnum):
    """Which entries of a site are kept: so many of each token (`top-k`), or those above a calibrated threshold.

    With a threshold the number varies from token to token, and the sparsity is met on average.
    """

    TOP_K = "top-k"
    THRESHOLD = "threshold"


class Rotation(StrEnum):
    """Which orthogonal bases are merged into the weights (paper, section 5.3)."""

    NONE = "none"
    RANDOM = "random"
    MODEL = "model"
    LAYER = "layer"
    BLOCK = "block"

    @property
    def rotates(self) -> bool:
        """Whether the residual stream is in another basis than the dense model's, which unties a head."""
        return self is not Rotation.NONE

    @property
    def has_adapters(self) -> bool:
        """Whether the residual stream changes its basis on the way."""
        return self in (Rotation.LAYER, Rotation.BLOCK)

    @property
    def is_calibrated(self) -> bool:
        """Whether the bases come from the second moments of calibration activations."""
        return self in (Rotation.MODEL, Rotation.LAYER, Rotation.BLOCK)

    @property
    def chooses_covariance(self) -> bool:
        """Whether a basis serves both h1 and h3, so that there is a choice of what the PCA is of."""
        return self in (Rotation.MODEL, Rotation.LAYER)

    def groups(self, layers: int, layers_per_rotation: int = 1) -> list[range]:
        """The consecutive layers that share a basis, first layer first; the first group may be shorter.

        An adapter carries the residual stream from one group's basis to the next. What does not divide evenly is
        left over at the beginning, as the first layers have the least in common with others.
        """
        size = layers_per_rotation if self.has_adapters else layers
        return [range(layers)[max(end - size, 0) : end] for end in range(layers, 0, -size)][::-1]


class AdapterFormat(StrEnum):
    """What adapters are stored as: the model's own dtype (`full`), or 8 bits and a scale an output (`int8`)."""

    FULL = "full"
    INT8 = "int8"


class Covariance(StrEnum):
    """Which site's second moment the PCA of a layer is taken of."""

    H1 = "h1"
    H3 = "h3"
    JOINT = "joint"


class RotationObjective(StrEnum):
    """What a rotation concentrates on few entries.

    The activations (`inputs`), or with equal regard what the weights make of them (`outputs`) or what the
    model's predictions make of them (`fisher`).
    """

    INPUTS = "inputs"
    OUTPUTS = "outputs"
    FISHER = "fisher"


class Score(StrEnum):
    """What Top-K ranks entries by.

    Their magnitude, or that times the norm of the weights that read them (`weights`), or times the root of
    their Fisher information, by which the model's predictions move (`fisher`).
    """

    MAGNITUDE = "magnitude"
    WEIGHTS = "weights"
    FISHER = "fisher"

    @property
    def has_vectors(self) -> bool:
        """Whether every site has a vector of scores."""
        return self is not Score.MAGNITUDE


class Budget(StrEnum):
    """What a sparsity of p means: the paper's equations 17 and 18, or p of all weight elements skipped."""

    PAPER = "paper"
    WEIGHTS = "weights"


class Search(StrEnum):
    """How sparsity is shared out among the sites.

    Evenly, by the paper's Algorithm 1 (`grid`), by TEAL's (`greedy`), by the divergence measured with one site
    sparsified after the other (`sensitivity`), or by that which Fisher scores estimate (`fisher`).
    """

    NONE = "none"
    GRID = "grid"
    GREEDY = "greedy"
    SENSITIVITY = "sensitivity"
    FISHER = "fisher"

    @property
    def keeps_log(self) -> bool:
        """Whether it measures point after point, which a log keeps."""
        return self in (Search.GRID, Search.SENSITIVITY)


class Compensation(StrEnum):
    """What makes up for dropped entries: nothing, or weights refitted to the kept ones (`linear`)."""

    NONE = "none"
    LINEAR = "linear"


class Recipe(StrEnum):
    """A named set of defaults: the paper's settings, or the best that costs nothing at run time."""

    PAPER = "paper"
    BEST = "best"


class Prefill(StrEnum):
    """Whether prompts are sparsified like generated tokens (the paper's setting) or run dense."""

    SPARSE = "sparse"
    DENSE = "dense"


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


class Thresholds(_Block):
    """Magnitudes up to which a site's entries are dropped: one list a site, one number a layer.

    `dropped` is the share of the calibration tokens' entries that each threshold drops. What it drops of
    another token differs from token to token.
    """

    values: dict[_Site, list[_Magnitude]]
    dropped: dict[_Site, list[_Share]]

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
