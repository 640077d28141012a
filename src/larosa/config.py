"""Everything about a sparsified model that is not a weight: the `larosa` block of `config.json`."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from larosa.errors import LarosaError

FORMAT_VERSION = 1

#: The four activation sites of a decoder layer (paper, section 3.1): the inputs of
#: q/k/v (h1), of the attention output projection (h2), of gate/up (h3) and of down (h4).
SITES = ("h1", "h2", "h3", "h4")


class Rotation(StrEnum):
    """Which orthogonal bases are merged into the weights (paper, section 5.3)."""

    NONE = "none"
    RANDOM = "random"
    MODEL = "model"
    LAYER = "layer"
    BLOCK = "block"

    @property
    def is_calibrated(self) -> bool:
        """Whether the bases come from the second moments of calibration activations."""
        return self in (Rotation.MODEL, Rotation.LAYER, Rotation.BLOCK)


class Covariance(StrEnum):
    """Which site's second moment the PCA of a layer is taken of."""

    H1 = "h1"
    H3 = "h3"
    JOINT = "joint"


class Budget(StrEnum):
    """What a sparsity of p means: the paper's equations 17 and 18, or p of all weight elements skipped."""

    PAPER = "paper"
    WEIGHTS = "weights"


class Search(StrEnum):
    """How the per-site sparsity coefficients are found: all 1, or the paper's Algorithm 1."""

    NONE = "none"
    GRID = "grid"


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


class CalibrationRecord(_Block):
    """What the model was calibrated on; kept for the record, never read again."""

    source: str
    num_sequences: int = Field(gt=0)
    sequence_length: int = Field(gt=0)
    seed: int


class LarosaConfig(_Block):
    """A sparsified model's settings, as stored under `larosa` in its `config.json`.

    `keep` is what the model runs by; the other keys say how it came about.
    """

    format_version: int = FORMAT_VERSION
    larosa_version: str
    method: str = Field(default="larosa", pattern="^larosa$")
    recipe: Recipe
    sparsity: float = Field(ge=0, lt=1)
    budget: Budget
    alphas: PerSite = PerSite()
    keep: KeepCounts
    rotation: Rotation
    covariance: Covariance
    search: Search
    prefill: Prefill = Prefill.SPARSE
    calibration: CalibrationRecord | None = None

    @classmethod
    def parse(cls, block: Any) -> LarosaConfig:
        """Validate the `larosa` block of a `config.json`.

        Raises:
            LarosaError: the block is missing, of a newer format, or has an unknown or invalid key.
        """
        if not isinstance(block, dict):
            raise LarosaError("config.json has no 'larosa' block: this is not a converted checkpoint")
        version = block.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise LarosaError(
                f"this checkpoint has format version {version}, this larosa reads up to {FORMAT_VERSION}: "
                "pip install --upgrade larosa"
            )
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
