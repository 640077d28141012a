"""The rows of the comparisons: which method, in which basis, with which coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from larosa.config import (
    Compensation,
    Covariance,
    Method,
    Recipe,
    Rotation,
    RotationObjective,
    Score,
    Search,
    Selection,
)
from larosa.formats import ColumnFormat, Quantizer, WeightFormat
from larosa.sparsity import SiteSizes


@dataclass(frozen=True)
class Variant:
    """A way to sparsify the model; the parts of recipe `best` are off unless named.

    `searched` takes the coefficients from a grid, else all are 1.

    `calibration` and `seed` are the run's own where they are None.
    """

    label: str
    method: Method
    rotation: Rotation = Rotation.NONE
    covariance: Covariance = Covariance.H1
    searched: bool = False
    calibration: str | None = None
    seed: int | None = None
    objective: RotationObjective = RotationObjective.INPUTS
    value_rotation: bool = False
    score: Score = Score.MAGNITUDE
    #: A search for counts of each layer and site, run anew at each sparsity.
    allocation: Search = Search.NONE
    compensation: Compensation = Compensation.NONE
    #: What the decoder's linears are stored in, how they are rounded to it, and what the head is stored in beside them.
    weights: WeightFormat = WeightFormat.FULL
    quantizer: Quantizer | None = None
    head: WeightFormat = WeightFormat.FULL
    #: Instead of `weights`: a format that no checkpoint has, which GPTQ rounds to.
    unstored: ColumnFormat | None = None
    #: All options from a recipe, whatever it consists of; those above are then without meaning.
    recipe: Recipe | None = None

    @property
    def search(self) -> Search | None:
        """The search to convert with; None leaves it to the recipe."""
        return None if self.recipe else self.allocation

    @property
    def shares_out_counts(self) -> bool:
        """Whether one conversion knows the counts or thresholds of every sparsity, by a search."""
        return self.recipe is not None or self.allocation is Search.FISHER

    @property
    def of_one_sparsity(self) -> bool:
        """Whether another sparsity needs another conversion, not other counts alone."""
        return (
            Selection.TOP_K not in self.method.selections
            or self.allocation not in (Search.NONE, Search.FISHER)
            or self.compensation is not Compensation.NONE
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether it depends on the calibration sample."""
        parts = self.rotation.is_calibrated or self.value_rotation or self.score is Score.FISHER
        fitted = self.quantizer is Quantizer.GPTQ
        return Selection.TOP_K not in self.method.selections or parts or fitted or self.recipe is not None

    @property
    def options(self) -> dict[str, Any]:
        """What `larosa.convert` is told beside the method; the methods it is compared with have none of their own."""
        stored = self.stored
        if self.method is not Method.LAROSA:
            return stored
        if self.recipe is not None:
            return {"recipe": self.recipe, **stored}
        return {
            **stored,
            "rotation": self.rotation,
            "covariance": self.covariance,
            "rotation_objective": self.objective,
            "value_rotation": self.value_rotation,
            "score": self.score,
            "selection": Selection.TOP_K,
            "compensation": self.compensation,
        }

    @property
    def stored(self) -> dict[str, Any]:
        """The options among them that say what weights are stored in."""
        if self.weights is WeightFormat.FULL and self.unstored is None:
            return {}
        return {"weights": self.weights, "quantizer": self.quantizer, "head": self.head}

    @property
    def in_full(self) -> Self:
        """The same with weights as they are."""
        return replace(self, weights=WeightFormat.FULL, quantizer=None, head=WeightFormat.FULL, unstored=None)

    def using(self, calibration: str, seed: int) -> Self:
        """The same on another calibration sample."""
        return replace(self, calibration=calibration, seed=seed)


CATS = Variant("CATS", Method.CATS)
TEAL = Variant("TEAL", Method.TEAL)
TOPK = Variant("TopK", Method.TOPK)
TOPK_GS = Variant("TopK+GS", Method.TOPK, searched=True)
#: The paper's method: PCA of h1 alone, one basis a layer, coefficients from the grid.
LAROSA = Variant("LaRoSA", Method.LAROSA, Rotation.LAYER, searched=True)
#: The same with PCA of h1 and h3 together, this package's default.
LAROSA_JOINT = Variant("LaRoSA, PCA of h1 and h3", Method.LAROSA, Rotation.LAYER, Covariance.JOINT, searched=True)

#: What `larosa convert` does where nothing is asked for.
BEST = Variant("best", Method.LAROSA, recipe=Recipe.BEST)


def reachable(variant: Variant, sparsity: float, sizes: SiteSizes) -> bool:
    """Whether a method can skip this fraction of all weights."""
    return sparsity < sizes.reach(variant.method)
