"""From a nominal sparsity to entries kept per site (paper, section 4.3 and equations 17 to 20)."""

from __future__ import annotations

from larosa.config import SITES, Budget, KeepCounts, PerSite
from larosa.errors import LarosaError
from larosa.sparsity.sites import SiteSizes


def complete_alphas(alpha1: float, alpha3: float, budget: Budget, sizes: SiteSizes) -> PerSite:
    """All four sparsity coefficients from those of h1 and h3, within a budget.

    The attention block and the MLP each hold their own budget. Under `paper` the weights of h1 and h2
    are 3 and 1, those of h3 and h4 are 2 and M = intermediate / hidden (equations 17 and 18); under
    `weights` each site weighs as much as the matrices that read it.
    """
    if budget is Budget.PAPER:
        weight = {"h1": 3.0, "h2": 1.0, "h3": 2.0, "h4": sizes.width["h4"] / sizes.hidden}
    else:
        weight = {site: float(sizes.weights(site)) for site in SITES}

    def rest(alpha: float, first: str, second: str) -> float:
        return (weight[first] + weight[second] - weight[first] * alpha) / weight[second]

    return PerSite(h1=alpha1, h2=rest(alpha1, "h1", "h2"), h3=alpha3, h4=rest(alpha3, "h3", "h4"))


def keep_counts(sparsity: float, alphas: PerSite, sizes: SiteSizes) -> KeepCounts:
    """Entries that each site keeps: k = D - round(alpha * p * D), in every layer the same.

    The coefficient scales the sparsity, not the kept share: the paper's Table 5 (alpha 0.90 gives 45.0%
    at p = 50%) decides against the formula in its section 4.3.

    Raises:
        LarosaError: a coefficient asks for a site sparsity outside [0, 1].
    """
    counts = {}
    for site in SITES:
        share = alphas[site] * sparsity
        if not 0 <= share <= 1:
            raise LarosaError(
                f"sparsity {sparsity:g} with alpha {alphas[site]:g} asks site {site} to drop {share:.0%} "
                "of its entries: lower one of them"
            )
        counts[site] = [keeps_of(sizes.width[site], share)] * sizes.layers
    return KeepCounts(**counts)


def keeps_of(width: int, share_dropped: float) -> int:
    """Entries left of `width` when a share of them is dropped."""
    return width - round(share_dropped * width)
