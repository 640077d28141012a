"""What a conversion is asked to do: the user's options, completed by a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from larosa.config import (
    AdapterFormat,
    Budget,
    CalibrationRecord,
    Compensation,
    Covariance,
    Method,
    PerSite,
    Prefill,
    Recipe,
    Rotation,
    RotationObjective,
    Score,
    Search,
    Selection,
    check_adapters,
    check_layers_per_rotation,
    check_quantization,
    check_sparsity,
)
from larosa.errors import LarosaError, choose
from larosa.formats import Quantization, Quantizer


@dataclass(frozen=True)
class Defaults:
    """What a recipe sets where the user does not."""

    budget: Budget
    covariance: Covariance
    search: Search
    calibration: str
    rotation_objective: RotationObjective
    value_rotation: bool
    score: Score
    dense_first_token: bool
    selection: Selection = Selection.TOP_K
    adapters: AdapterFormat | None = None
    rotation: Rotation = Rotation.LAYER
    num_sequences: int = 16
    sequence_length: int = 2048


#: `paper` is section 5.1 of the paper; `best` is what measured best on a real trained model at equal bytes per token:
#: there adapters cost more than rotating the residual stream gains (docs/recipe.md).
RECIPES = {
    Recipe.PAPER: Defaults(
        budget=Budget.PAPER,
        covariance=Covariance.H1,
        search=Search.GRID,
        calibration="wikitext2",
        rotation_objective=RotationObjective.INPUTS,
        value_rotation=False,
        score=Score.MAGNITUDE,
        dense_first_token=False,
        adapters=AdapterFormat.FULL,
    ),
    Recipe.BEST: Defaults(
        budget=Budget.WEIGHTS,
        covariance=Covariance.JOINT,
        search=Search.FISHER,
        calibration="self",
        rotation_objective=RotationObjective.INPUTS,
        value_rotation=True,
        score=Score.FISHER,
        dense_first_token=True,
        selection=Selection.THRESHOLD,
        rotation=Rotation.NONE,
        # As many tokens as the paper's 8 x 2048, but sampled from the model in an eighth of the steps.
        num_sequences=64,
        sequence_length=256,
    ),
}


@dataclass(frozen=True)
class Applicable:
    """Which options mean something to a method; the others may be given only as what it does anyway."""

    rotation: bool
    coefficients: bool
    searches: tuple[Search, ...]


_COUNTING = (Search.NONE, Search.GRID, Search.SENSITIVITY, Search.FISHER)

#: Coefficients are what a budget and alphas are about: they share out counts among the sites. What counts
#: can also rank by a score.
METHODS = {
    Method.LAROSA: Applicable(rotation=True, coefficients=True, searches=_COUNTING),
    Method.TOPK: Applicable(rotation=False, coefficients=True, searches=_COUNTING),
    Method.TEAL: Applicable(rotation=False, coefficients=False, searches=(Search.NONE, Search.GREEDY)),
    Method.CATS: Applicable(rotation=False, coefficients=False, searches=(Search.NONE,)),
}


@dataclass(frozen=True)
class Settings:
    """The complete settings of a conversion; None where nothing needs the thing."""

    sparsity: float
    method: Method
    recipe: Recipe
    budget: Budget
    rotation: Rotation
    layers_per_rotation: int
    adapters: AdapterFormat | None  # None: what suits the model's dtype
    covariance: Covariance | None
    rotation_objective: RotationObjective | None
    value_rotation: bool
    score: Score
    selection: Selection
    search: Search
    compensation: Compensation
    quantization: Quantization | None
    prefill: Prefill
    dense_first_token: bool
    alphas: PerSite | None
    seed: int
    calibration: CalibrationRecord | None

    @property
    def needs_fisher(self) -> bool:
        """Whether calibration goes backwards through the model too."""
        calibrated = self.rotation.is_calibrated or self.value_rotation
        return self.score is Score.FISHER or (calibrated and self.rotation_objective is RotationObjective.FISHER)

    @classmethod
    def complete(
        cls,
        *,
        sparsity: float,
        method: str = Method.LAROSA,
        recipe: str = Recipe.BEST,
        budget: str | None = None,
        calibration: str | None = None,
        num_sequences: int | None = None,
        sequence_length: int | None = None,
        seed: int = 0,
        rotation: str | None = None,
        layers_per_rotation: int = 1,
        adapters: str | None = None,
        covariance: str | None = None,
        rotation_objective: str | None = None,
        value_rotation: bool | None = None,
        score: str | None = None,
        selection: str | None = None,
        search: str | None = None,
        compensation: str = Compensation.NONE,
        weights: str | None = None,
        weight_group: int | None = None,
        quantizer: str | None = None,
        head: str | None = None,
        prefill: str = Prefill.SPARSE,
        dense_first_token: bool | None = None,
        alphas: PerSite | None = None,
        context: int | None = None,
    ) -> Self:
        """Check the user's options and take the rest from the recipe.

        Args:
            context: tokens that the model has room for, which bounds the recipe's own sequence length; None where
                that is not known yet.

        Raises:
            LarosaError: an unknown choice, a number out of range, options that exclude each other, or one
                that does not apply to the method.
        """
        chosen_recipe = choose(Recipe, recipe, "recipe")
        chosen_method = choose(Method, method, "method")
        applicable = METHODS[chosen_method]
        defaults = _defaults(chosen_recipe, chosen_method)
        chosen_rotation = choose(Rotation, rotation or defaults.rotation, "rotation")
        chosen_budget = choose(Budget, budget or defaults.budget, "budget")
        chosen_covariance = choose(Covariance, covariance or defaults.covariance, "covariance")
        chosen_objective = choose(
            RotationObjective, rotation_objective or defaults.rotation_objective, "rotation objective"
        )
        if chosen_rotation is Rotation.RANDOM:  # the control is to be free of calibration, unless a part is asked for
            defaults = replace(defaults, value_rotation=False, score=_uncalibrated(defaults.score))
        if not chosen_rotation.has_adapters:
            defaults = replace(defaults, adapters=AdapterFormat.FULL)
        chosen_adapters = defaults.adapters
        if adapters is not None:
            chosen_adapters = check_adapters(choose(AdapterFormat, adapters, "adapters"), chosen_rotation)
        if value_rotation is None:
            value_rotation = defaults.value_rotation
        chosen_score = choose(Score, score or defaults.score, "score")
        if alphas is not None or (
            defaults.search is Search.FISHER
            and (chosen_score is not Score.FISHER or chosen_budget is not Budget.WEIGHTS)
        ):
            defaults = replace(defaults, search=Search.NONE)
        chosen_search = choose(Search, search or defaults.search, "search")
        if chosen_search is not Search.FISHER or compensation != Compensation.NONE:  # what finds and refits counts
            defaults = replace(defaults, selection=chosen_method.selections[0])
        chosen_selection = choose(Selection, selection or defaults.selection, "selection")
        _check_applicable(
            chosen_method,
            {
                f"--rotation {rotation}": applicable.rotation or chosen_rotation is Rotation.NONE,
                f"--covariance {covariance}": applicable.rotation or covariance is None,
                f"--rotation-objective {rotation_objective}": applicable.rotation or rotation_objective is None,
                "--value-rotation": applicable.rotation or not value_rotation,
                f"--score {score}": applicable.coefficients or chosen_score is Score.MAGNITUDE,
                f"--selection {selection}": chosen_selection in chosen_method.selections,
                f"--budget {budget}": applicable.coefficients or chosen_budget is Budget.WEIGHTS,
                f"--search {search}": chosen_search in applicable.searches,
                f"--compensation {compensation}": applicable.coefficients or compensation == Compensation.NONE,
                "alphas": applicable.coefficients or alphas is None,
            },
        )
        if alphas is not None and chosen_search is not Search.NONE:
            raise LarosaError("give either alphas or a search, not both")
        if chosen_search in (Search.SENSITIVITY, Search.FISHER) and chosen_budget is Budget.PAPER:
            raise LarosaError(
                f"--search {chosen_search} shares out weights, not the paper's budget: add --budget weights"
            )
        if chosen_search is Search.FISHER and chosen_score is not Score.FISHER:
            raise LarosaError("--search fisher goes by the scores' estimates: add --score fisher")
        if (
            chosen_method is Method.LAROSA
            and chosen_selection is Selection.THRESHOLD
            and chosen_search is not Search.FISHER
        ):
            raise LarosaError("--selection threshold finds its thresholds by --search fisher: add it")
        chosen_prefill = choose(Prefill, prefill, "prefill")
        chosen_compensation = choose(Compensation, compensation, "compensation")
        compensates = chosen_compensation is not Compensation.NONE
        if compensates and chosen_selection is not Selection.TOP_K:
            raise LarosaError("--compensation linear refits to counted entries: leave --selection threshold out")
        if compensates and chosen_prefill is Prefill.DENSE:
            raise LarosaError("--compensation linear fits the weights to sparse prompts: leave --prefill dense out")
        quantization = check_quantization(Quantization.complete(weights, head, weight_group, quantizer), chosen_method)
        fits = quantization is not None and quantization.quantizer is Quantizer.GPTQ
        record = None
        calibrated = (
            fits or chosen_rotation.is_calibrated or value_rotation or chosen_score is Score.FISHER or compensates
        )
        if calibrated or chosen_search is not Search.NONE or chosen_selection is not Selection.TOP_K:
            record = CalibrationRecord(
                source=calibration or defaults.calibration,
                num_sequences=_positive(num_sequences, defaults.num_sequences, "num-sequences"),
                sequence_length=_positive(
                    sequence_length,
                    min(defaults.sequence_length, context or defaults.sequence_length),
                    "sequence-length",
                ),
                seed=seed,
            )
            if chosen_search in (Search.GRID, Search.SENSITIVITY, Search.FISHER) and record.sequence_length < 2:
                raise LarosaError("--sequence-length must be at least 2 for a search: it predicts tokens")
        return cls(
            sparsity=check_sparsity(sparsity),
            method=chosen_method,
            recipe=chosen_recipe,
            budget=chosen_budget,
            rotation=chosen_rotation,
            layers_per_rotation=check_layers_per_rotation(layers_per_rotation, chosen_rotation),
            adapters=chosen_adapters,
            covariance=chosen_covariance if chosen_rotation.chooses_covariance else None,
            rotation_objective=chosen_objective if applicable.rotation else None,
            value_rotation=value_rotation,
            score=chosen_score,
            selection=chosen_selection,
            search=chosen_search,
            compensation=chosen_compensation,
            quantization=quantization,
            prefill=chosen_prefill,
            dense_first_token=defaults.dense_first_token if dense_first_token is None else dense_first_token,
            alphas=(alphas or PerSite()) if applicable.coefficients else None,
            seed=seed,
            calibration=record,
        )


def _defaults(recipe: Recipe, method: Method) -> Defaults:
    """The recipe's defaults, as far as they apply."""
    defaults, applicable = RECIPES[recipe], METHODS[method]
    selections = method.selections
    return replace(
        defaults,
        selection=defaults.selection if defaults.selection in selections else selections[0],
        rotation=defaults.rotation if applicable.rotation else Rotation.NONE,
        budget=defaults.budget if applicable.coefficients else Budget.WEIGHTS,
        search=defaults.search if defaults.search in applicable.searches else Search.NONE,
        # What larosa is compared with is as others published it, unless a part is asked for.
        value_rotation=defaults.value_rotation and applicable.rotation,
        score=defaults.score if applicable.rotation else Score.MAGNITUDE,
    )


def _uncalibrated(score: Score) -> Score:
    return Score.WEIGHTS if score is Score.FISHER else score


def _check_applicable(method: Method, options: dict[str, bool]) -> None:
    for option, applies in options.items():
        if not applies:
            raise LarosaError(f"{option} does not apply to method {method}: {_WHAT_APPLIES[method]}")


_WHAT_APPLIES = {
    Method.LAROSA: "its searches are none, grid, sensitivity and fisher",
    Method.TOPK: "it rotates nothing, and its searches are none, grid, sensitivity and fisher",
    Method.TEAL: "it rotates nothing, compares magnitudes, budgets by weights, and its searches are none and greedy",
    Method.CATS: "it rotates nothing, compares magnitudes, budgets by weights, and has no search",
}


def _positive(value: int | None, default: int, name: str) -> int:
    if value is not None and value < 1:
        raise LarosaError(f"--{name} must be at least 1, not {value}")
    return value or default
