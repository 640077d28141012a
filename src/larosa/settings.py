"""What a conversion is asked to do: the user's options, completed by a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeVar

from larosa.config import (
    Budget,
    CalibrationRecord,
    Covariance,
    PerSite,
    Prefill,
    Recipe,
    Rotation,
    Search,
    check_sparsity,
)
from larosa.errors import LarosaError

Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True)
class Defaults:
    """What a recipe sets where the user does not."""

    budget: Budget
    covariance: Covariance
    search: Search
    calibration: str
    rotation: Rotation = Rotation.LAYER
    num_sequences: int = 16
    sequence_length: int = 2048


#: `paper` is section 5.1 of the paper; `best` is what measured better at no cost at run time.
RECIPES = {
    Recipe.PAPER: Defaults(Budget.PAPER, Covariance.H1, Search.GRID, "wikitext2"),
    Recipe.BEST: Defaults(Budget.WEIGHTS, Covariance.JOINT, Search.NONE, "self"),
}


@dataclass(frozen=True)
class Settings:
    """The complete settings of a conversion; `calibration` is None where nothing needs it."""

    sparsity: float
    recipe: Recipe
    budget: Budget
    rotation: Rotation
    covariance: Covariance
    search: Search
    prefill: Prefill
    alphas: PerSite
    seed: int
    calibration: CalibrationRecord | None

    @classmethod
    def complete(
        cls,
        *,
        sparsity: float,
        recipe: str = Recipe.BEST,
        budget: str | None = None,
        calibration: str | None = None,
        num_sequences: int | None = None,
        sequence_length: int | None = None,
        seed: int = 0,
        rotation: str | None = None,
        covariance: str | None = None,
        search: str | None = None,
        prefill: str = Prefill.SPARSE,
        alphas: PerSite | None = None,
    ) -> Self:
        """Check the user's options and take the rest from the recipe.

        Raises:
            LarosaError: an unknown choice, a number out of range, or options that exclude each other.
        """
        chosen_recipe = _choose(Recipe, recipe, "recipe")
        defaults = RECIPES[chosen_recipe]
        chosen_rotation = _choose(Rotation, rotation or defaults.rotation, "rotation")
        chosen_search = _choose(Search, search or (Search.NONE if alphas else defaults.search), "search")
        if alphas is not None and chosen_search is not Search.NONE:
            raise LarosaError("give either alphas or a search, not both")
        record = None
        if chosen_rotation.is_calibrated or chosen_search is not Search.NONE:
            record = CalibrationRecord(
                source=calibration or defaults.calibration,
                num_sequences=_positive(num_sequences, defaults.num_sequences, "num-sequences"),
                sequence_length=_positive(sequence_length, defaults.sequence_length, "sequence-length"),
                seed=seed,
            )
            if chosen_search is not Search.NONE and record.sequence_length < 2:
                raise LarosaError("--sequence-length must be at least 2 for a search: it predicts tokens")
        return cls(
            sparsity=check_sparsity(sparsity),
            recipe=chosen_recipe,
            budget=_choose(Budget, budget or defaults.budget, "budget"),
            rotation=chosen_rotation,
            covariance=_choose(Covariance, covariance or defaults.covariance, "covariance"),
            search=chosen_search,
            prefill=_choose(Prefill, prefill, "prefill"),
            alphas=alphas or PerSite(),
            seed=seed,
            calibration=record,
        )


def _choose(enum: type[Choice], value: str, name: str) -> Choice:
    try:
        return enum(value)
    except ValueError:
        raise LarosaError(f"unknown {name} '{value}': one of {', '.join(list(enum))}") from None


def _positive(value: int | None, default: int, name: str) -> int:
    if value is not None and value < 1:
        raise LarosaError(f"--{name} must be at least 1, not {value}")
    return value or default
