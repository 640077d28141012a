"""What theory predicts for the error of Top-K (paper, Theorem A.1)."""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()


def theoretical_relative_error(k: float, width: int) -> float:
    """E|y - y'| / E|y| when `k` of `width` activations are kept, for i.i.d. Gaussian activations and weights.

    sqrt(1 - k/D - 2 t phi(t)) with t = Phi^-1(1 - k / (2 D)): equation 11. `k` need not be whole: an
    expected count gives the error of a threshold.

    Raises:
        ValueError: k is outside [0, width].
    """
    if not 0 <= k <= width or width < 1:
        raise ValueError(f"cannot keep {k} of {width} entries")
    if k == 0:
        return 1.0
    t = _NORMAL.inv_cdf(1 - k / (2 * width))
    # Rounding can take the square a little below 0 where nearly everything is kept.
    return math.sqrt(max(0.0, 1 - k / width - 2 * t * _NORMAL.pdf(t)))
