"""Algorithm 1 of the paper: grid search of the sparsity coefficients by calibration perplexity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from larosa.config import Budget, KeepCounts, PerSite
from larosa.errors import LarosaError
from larosa.sparsity.budget import complete_alphas, keep_counts
from larosa.sparsity.sites import SiteSizes
from larosa.utils.progress import track

#: The paper's grid for alpha 1 and alpha 3: 0.70, 0.75, ..., 1.20.
GRID = tuple(round(0.7 + 0.05 * step, 2) for step in range(11))


def grid_search(
    sparsity: float,
    budget: Budget,
    sizes: SiteSizes,
    perplexity: Callable[[KeepCounts], float],
    log: SearchLog,
) -> PerSite:
    """The coefficients of the grid point with the lowest calibration perplexity.

    Points whose remaining coefficients would leave [0, 1 / p] are skipped; the first of equal points
    wins. Every point is logged, and points already in the log are not run again.

    Args:
        perplexity: runs the calibration sequences with the given counts.
        log: where the points go.
    """
    points = []
    for alpha1 in GRID:
        for alpha3 in GRID:
            alphas = complete_alphas(alpha1, alpha3, budget, sizes)
            if all(0 <= alphas[site] * sparsity <= 1 for site in ("h1", "h2", "h3", "h4")):
                points.append(alphas)
    best, best_perplexity = PerSite(), float("inf")
    for alphas in track(points, "Grid search"):
        key = (alphas.h1, alphas.h3)
        if key not in log.points:
            log.add(key, perplexity(keep_counts(sparsity, alphas, sizes)))
        if log.points[key] < best_perplexity:
            best, best_perplexity = alphas, log.points[key]
    return best


class SearchLog:
    """The points of a search, one JSON object a line, so that a killed search goes on where it stopped.

    A point is some numbers, the keys `names` of its line, and what was measured there, the key `measured`.

    The first line holds the settings; a log of other settings is refused, never mixed in.
    """

    def __init__(
        self,
        path: Path | None,
        settings: dict[str, Any],
        names: tuple[str, ...] = ("alpha1", "alpha3"),
        measured: str = "perplexity",
    ) -> None:
        """Open or continue the log at `path`; None keeps the points in memory alone.

        Raises:
            LarosaError: the file belongs to other settings or is not such a log.
        """
        self.path = path
        self.points: dict[tuple[float, ...], float] = {}
        self._names, self._measured = names, measured
        if path is None:
            return
        try:
            if not path.exists():
                path.write_text(json.dumps(settings) + "\n", "utf-8")
                return
            lines = path.read_text("utf-8").splitlines()
            # A kill in the middle of a write leaves a last line without its end: run that point again.
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            found = rows[0]
            points = {tuple(float(r[name]) for name in names): float(r[measured]) for r in rows[1:]}
        except OSError as error:
            raise LarosaError(f"{path}: {error.strerror}; name another with --search-log") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise LarosaError(f"{path}: not a search log; name another with --search-log or delete it") from None
        if found != settings:
            changed = ", ".join(sorted(k for k in found.keys() | settings if found.get(k) != settings.get(k)))
            raise LarosaError(f"{path}: a search with other settings ({changed}); delete it or name another")
        self.points = points
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def add(self, point: tuple[float, ...], value: float) -> None:
        """Record one point, on disk at once."""
        self.points[point] = value
        if self.path is not None:
            row = {**dict(zip(self._names, point, strict=True)), self._measured: value}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
