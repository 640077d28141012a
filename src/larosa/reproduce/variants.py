"""The rows of the comparisons: which method, in which basis, with which coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from larosa.config import Compensation, Covariance, Method, Rotation, RotationObjective, Score, Search, Selection
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

    @property
    def of_one_sparsity(self) -> bool:
        """Whether another sparsity needs another conversion, not other counts alone."""
        return (
            Selection.TOP_K not in self.method.selections
            or self.allocation is not Search.NONE
            or self.compensation is not Compensation.NONE
        )

    @property
    def options(self) -> dict[str, Any]:
        """What `larosa.convert` is told beside the method; the methods it is compared with have no options."""
        if self.method is not Method.LAROSA:
            return {}
        return {
            "rotation": self.rotation,
            "covariance": self.covariance,
            "rotation_objective": self.objective,
            "value_rotation": self.value_rotation,
            "score": self.score,
            "compensation": self.compensation,
        }

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


def reachable(variant: Variant, sparsity: float, sizes: SiteSizes) -> bool:
    """Whether a method can skip this fraction of all weights."""
    return sparsity < sizes.reach(variant.method)
