"""What a conversion is asked to do: the user's options, completed by a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, get_args, get_type_hints

import typer

from larosa.config import (
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
    Settings,
    check_adapters,
    check_layers_per_rotation,
    check_planes,
    check_quantization,
    check_sparsity,
)
from larosa.errors import LarosaError, choose
from larosa.formats import AdapterFormat, Quantization, Quantizer, WeightFormat


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


class ConversionSettings(Settings):
    """The complete settings of a conversion.

    `adapters` is None for what suits the model's dtype; `seed` is of random rotations, and the calibration's.
    """

    selection: Selection
    adapters: AdapterFormat | None
    seed: int

    @property
    def needs_fisher(self) -> bool:
        """Whether calibration goes backwards through the model too."""
        calibrated = self.rotation.is_calibrated or self.value_rotation
        return self.score is Score.FISHER or (calibrated and self.rotation_objective is RotationObjective.FISHER)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What a user asks of a conversion: `larosa.convert` takes these by keyword, `larosa convert` as options.

    None takes the recipe's default. Choices may be given by their values, as strings; their types say what each means.

    - `sparsity` is a fraction of what `budget` says.
    - `calibration` is `self` (sampled from the model), a named data set, `bundled`, or the path of a file or folder;
      `seed` is of its sample, and of random rotations.
    - `adapters` is `int8` for models of 16 bits, `weight_group` 32 for 4 and 5 bits, 64 for 6 and 4+4, 128 for 8,
      `quantizer` `gptq` but for 4+4, `head` `int8` where `weights` are of few bits.
    - `selection` `threshold` needs search `fisher`, and meets the sparsity on average.
    - `alphas` are coefficients of the sites' sparsities, instead of a search.
    """

    sparsity: Annotated[float, typer.Option(help="Fraction of weights to skip per token, in [0, 1).")] = 0.5
    method: Annotated[
        Method, typer.Option(help="larosa, or what it is compared with: topk (no rotation), teal, cats.")
    ] = Method.LAROSA
    recipe: Annotated[Recipe, typer.Option(help="Named defaults for the options below.")] = Recipe.BEST
    budget: Annotated[Budget | None, typer.Option(help="What the sparsity is a fraction of.")] = None
    calibration: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="self, wikitext2, alpaca, c4, or a .txt/.json/.jsonl file or folder."),
    ] = None
    num_sequences: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in each sequence.")] = None
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0
    rotation: Annotated[Rotation | None, typer.Option(help="Which bases to rotate into.")] = None
    layers_per_rotation: Annotated[int, typer.Option(help="Layers that share a rotation of --rotation layer.")] = 1
    adapters: Annotated[
        AdapterFormat | None,
        typer.Option(help="Store adapters between rotations in full, or by 8-bit numbers."),
    ] = None
    covariance: Annotated[Covariance | None, typer.Option(help="Which site's activations the PCA is of.")] = None
    rotation_objective: Annotated[
        RotationObjective | None, typer.Option(help="PCA of what the weights read, or also of what it does.")
    ] = None
    value_rotation: Annotated[
        bool | None, typer.Option("--value-rotation/--no-value-rotation", help="Rotate the value heads too.")
    ] = None
    score: Annotated[
        Score | None, typer.Option(help="Rank entries by magnitude, alone or times weight norm or Fisher information.")
    ] = None
    selection: Annotated[
        Selection | None,
        typer.Option(help="Keep so many entries of each token, or those above a threshold (more where they matter)."),
    ] = None
    search: Annotated[
        Search | None, typer.Option(help="Share out sparsity: grid, sensitivity, fisher (larosa, topk), greedy (teal).")
    ] = None
    compensation: Annotated[Compensation, typer.Option(help="Refit the weights to the entries that are kept.")] = (
        Compensation.NONE
    )
    weights: Annotated[
        WeightFormat | None, typer.Option(help="Store the decoder's linears in the model's dtype, or in few bits.")
    ] = None
    weight_group: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128; more take less and lose more.")
    ] = None
    quantizer: Annotated[
        Quantizer | None,
        typer.Option(help="Round each weight (rtn), or let others make up for it (gptq, the default)."),
    ] = None
    head: Annotated[
        WeightFormat | None, typer.Option(help="Store the language-model head likewise; int8 beside such weights.")
    ] = None
    prefill: Annotated[Prefill, typer.Option(help="Sparsify prompts too, or run them dense.")] = Prefill.SPARSE
    dense_first_token: Annotated[
        bool | None,
        typer.Option("--dense-first-token/--sparse-first-token", help="Leave a text's first token, the sink, dense."),
    ] = None
    alphas: PerSite | None = None

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, choose(kind, value, _CALLED.get(name, name.replace("_", " "))))

    def complete(self, context: int | None = None) -> ConversionSettings:
        """Check the options and take from the recipe what was not given.

        Args:
            context: tokens that the model has room for, which bounds the recipe's own sequence length; None where
                that is not known yet.

        Raises:
            LarosaError: a number out of range, options that exclude each other, or one that does not apply to the
                method.
        """
        method, applicable = self.method, METHODS[self.method]
        defaults = _defaults(self.recipe, method)
        rotation = self.rotation or defaults.rotation
        budget = self.budget or defaults.budget
        if rotation is Rotation.RANDOM:  # the control is to be free of calibration, unless a part is asked for
            defaults = replace(defaults, value_rotation=False, score=_uncalibrated(defaults.score))
        adapters = defaults.adapters if rotation.has_adapters else AdapterFormat.FULL
        if self.adapters is not None:
            adapters = check_adapters(self.adapters, rotation)
        value_rotation = defaults.value_rotation if self.value_rotation is None else self.value_rotation
        score = self.score or defaults.score
        fisher_applies = score is Score.FISHER and budget is Budget.WEIGHTS
        if self.alphas is not None or (defaults.search is Search.FISHER and not fisher_applies):
            defaults = replace(defaults, search=Search.NONE)
        search = self.search or defaults.search
        compensates = self.compensation is not Compensation.NONE
        if search is not Search.FISHER or compensates:  # what finds and refits counts
            defaults = replace(defaults, selection=method.selections[0])
        selection = self.selection or defaults.selection
        _check_applicable(
            method,
            {
                f"--rotation {rotation}": applicable.rotation or rotation is Rotation.NONE,
                f"--covariance {self.covariance}": applicable.rotation or self.covariance is None,
                f"--rotation-objective {self.rotation_objective}": applicable.rotation
                or self.rotation_objective is None,
                "--value-rotation": applicable.rotation or not value_rotation,
                f"--score {score}": applicable.coefficients or score is Score.MAGNITUDE,
                f"--selection {selection}": selection in method.selections,
                f"--budget {budget}": applicable.coefficients or budget is Budget.WEIGHTS,
                f"--search {search}": search in applicable.searches,
                f"--compensation {self.compensation}": applicable.coefficients or not compensates,
                "alphas": applicable.coefficients or self.alphas is None,
            },
        )
        if self.alphas is not None and search is not Search.NONE:
            raise LarosaError("give either alphas or a search, not both")
        if search in (Search.SENSITIVITY, Search.FISHER) and budget is Budget.PAPER:
            raise LarosaError(f"--search {search} shares out weights, not the paper's budget: add --budget weights")
        if search is Search.FISHER and score is not Score.FISHER:
            raise LarosaError("--search fisher goes by the scores' estimates: add --score fisher")
        if method is Method.LAROSA and selection is Selection.THRESHOLD and search is not Search.FISHER:
            raise LarosaError("--selection threshold finds its thresholds by --search fisher: add it")
        if compensates and selection is not Selection.TOP_K:
            raise LarosaError("--compensation linear refits to counted entries: leave --selection threshold out")
        if compensates and self.prefill is Prefill.DENSE:
            raise LarosaError("--compensation linear fits the weights to sparse prompts: leave --prefill dense out")
        quantization = Quantization.complete(self.weights, self.head, self.weight_group, self.quantizer)
        check_planes(quantization, selection, score)
        fits = quantization is not None and quantization.quantizer is Quantizer.GPTQ
        measures = search is not Search.NONE or selection is not Selection.TOP_K
        calibrated = rotation.is_calibrated or value_rotation or score is Score.FISHER
        record = None
        if fits or measures or calibrated or compensates:
            record = self._calibration(defaults, context)
            if search in (Search.GRID, Search.SENSITIVITY, Search.FISHER) and record.sequence_length < 2:
                raise LarosaError("--sequence-length must be at least 2 for a search: it predicts tokens")
        return ConversionSettings(
            sparsity=check_sparsity(self.sparsity),
            method=method,
            recipe=self.recipe,
            budget=budget,
            rotation=rotation,
            layers_per_rotation=check_layers_per_rotation(self.layers_per_rotation, rotation),
            adapters=adapters,
            covariance=(self.covariance or defaults.covariance) if rotation.chooses_covariance else None,
            rotation_objective=(self.rotation_objective or defaults.rotation_objective)
            if applicable.rotation
            else None,
            value_rotation=value_rotation,
            score=score,
            selection=selection,
            search=search,
            compensation=self.compensation,
            quantization=check_quantization(quantization, method),
            prefill=self.prefill,
            dense_first_token=defaults.dense_first_token if self.dense_first_token is None else self.dense_first_token,
            alphas=(self.alphas or PerSite()) if applicable.coefficients else None,
            seed=self.seed,
            calibration=record,
        )

    def _calibration(self, defaults: Defaults, context: int | None) -> CalibrationRecord:
        for name in ("num_sequences", "sequence_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise LarosaError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        longest = min(defaults.sequence_length, context or defaults.sequence_length)
        return CalibrationRecord(
            source=self.calibration or defaults.calibration,
            num_sequences=self.num_sequences or defaults.num_sequences,
            sequence_length=self.sequence_length or longest,
            seed=self.seed,
        )


#: The options that are one of several choices, and what messages call them where that is not their name.
_CHOICES = {
    name: kind
    for name, hint in get_type_hints(ConversionOptions).items()
    for kind in (hint, *get_args(hint))
    if isinstance(kind, type) and issubclass(kind, StrEnum)
}
_CALLED = {"weights": "format of weights", "head": "format of the head"}


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
