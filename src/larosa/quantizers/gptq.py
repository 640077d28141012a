"""Rounding whose errors the columns that follow make up for (GPTQ, arXiv 2210.17323), for groups inside a column."""

from __future__ import annotations

import torch

from larosa.formats import SCALE_DTYPE, ColumnFormat
from larosa.quantizers.scales import round_groups

#: What each entry's mean square is raised by, as a share of their mean.
_DAMPING = 0.01

#: Columns whose errors are passed on one by one before all that follow get them together.
_BLOCK = 64


def gptq(columns: torch.Tensor, moment: torch.Tensor, form: ColumnFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and whole numbers of columns, with a small error of the outputs rather than of the weights.

    Columns are rounded in the order of their inputs' mean squares, the largest first. What rounding one does to the
    outputs is passed on to those not yet rounded, as far as the second moment tells them; a group's scale is searched
    on what its column has become by then.

    Args:
        columns: [D, groups, G], float32 or float64, of all linears that read a site.
        moment: H = E[x^T x] of the site's inputs, [D, D] float64.

    Returns:
        Scales [D, groups] and q [D, groups, G], as `round_groups` gives them.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    passed_on = _passed_on(moment[order][:, order]).to(columns.dtype)
    left, shape = columns[order].flatten(1), columns.shape[1:]
    scales = torch.empty(columns.shape[:2], dtype=SCALE_DTYPE, device=columns.device)
    q = torch.empty_like(columns)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            found, whole = round_groups(left[at].view(shape), form)
            scales[order[at]], q[order[at]] = found, whole
            error = left[at] - (whole * found.to(whole)[:, None]).flatten()
            errors[at - start] = error
            left[at + 1 : stop].addr_(passed_on[at, at + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(passed_on[start:stop, stop:].T, errors, alpha=-1)
    return scales, q


def _passed_on(moment: torch.Tensor) -> torch.Tensor:
    """Row d: what of the error of column d each later column takes over, [D, D] upper triangular with ones.

    These are the rows of the Cholesky factor of H^-1, which has the inverse of H without the columns already rounded.
    """
    ridge = _DAMPING * float(moment.diagonal().mean())
    moment.diagonal().add_(ridge or 1.0)  # where nothing ever came there is nothing to pass on
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True)
    return factor / factor.diagonal()[:, None]
