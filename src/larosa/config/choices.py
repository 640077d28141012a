"""What there is to choose from: methods, rotations, scores, searches, and the sites where they act."""

from __future__ import annotations

from enum import StrEnum

#: The four activation sites of a decoder layer (paper, section 3.1): the inputs of
#: q/k/v (h1), of the attention output projection (h2), of gate/up (h3) and of down (h4).
SITES = ("h1", "h2", "h3", "h4")

#: The site of CATS: the activated gate of the MLP, whose zeros skip rows of up and columns of down.
GATE = "gate"

#: The input of the language-model head, which is sparse where the head is stored in planes.
HEAD = "head"


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
