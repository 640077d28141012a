"""How many entries each site keeps: dimensions, budgets and the search for coefficients."""

from larosa.sparsity.budget import complete_alphas, keep_counts, keeps_of
from larosa.sparsity.sites import SiteSizes

__all__ = ["SiteSizes", "complete_alphas", "keep_counts", "keeps_of"]
