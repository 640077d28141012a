"""Calibrated thresholds at many sparsities from one pass: what TEAL would use at each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from larosa.calibration import Magnitudes, attached, behind, visit_layers
from larosa.config import SITES, Recipe
from larosa.conversion.options import RECIPES
from larosa.reproduce.context import Context
from larosa.utils.progress import track


def calibrated_thresholds(context: Context, sparsities: Sequence[float]) -> dict[str, list[list[float]]]:
    """For each site one list a layer, of one threshold a sparsity: quantiles of the calibration magnitudes."""

    def measure() -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {site: [] for site in SITES}
        sequences, architecture = context.calibration(), context.architecture
        first = int(RECIPES[Recipe.BEST].dense_first_token)  # as in the conversions that are compared
        with torch.inference_mode():
            visits = visit_layers(context.dense(), architecture, sequences, torch.device(context.device))
            for visit in track(visits, "Thresholds", total=context.sizes.layers):
                seen = {site: Magnitudes(f"layer {visit.index}, site {site}") for site in SITES}
                with attached(*(architecture.tap(visit.layer, site, behind(first, m.see)) for site, m in seen.items())):
                    visit.outputs()
                for site, magnitudes in seen.items():
                    ordered = magnitudes.finish()
                    found[site].append([ordered.threshold(sparsity) for sparsity in sparsities])
        return found

    key = {"calibration": context.calibration_key(), "sparsities": list(sparsities)}
    return context.measure("thresholds", key, measure)
