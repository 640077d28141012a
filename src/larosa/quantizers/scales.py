"""Groups of weights rounded to whole numbers times a scale that is searched for each group."""

from __future__ import annotations

import torch

from larosa.errors import LarosaError
from larosa.formats import SCALE_DTYPE, ColumnFormat

#: Weights rounded at a time, with every scale that is tried: on a CPU so few that a core's cache holds them, elsewhere
#: so many that launches take no time.
_PIECE, _PIECE_ELSEWHERE = 2**18, 2**24


def round_groups(weights: torch.Tensor, form: ColumnFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole numbers q and scales s with the least sum of (w - s q)^2 in each group, over the scales tried.

    All weights of a group are in one column, multiplied with the same activation: they count alike. For each of the
    format's targets the largest magnitude is mapped there and the others rounded; the least-squares scale for the best
    of these is rounded once, and the whole numbers chosen anew for it.

    Args:
        weights: [..., G], float32 or float64, one group each.

    Returns:
        Scales [...] in `SCALE_DTYPE` and q [..., G] like `weights`. A group of zeros has scale 0.
    """
    top = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
    unit = weights / torch.where(top == 0, 1, top)
    targets = weights.new_tensor(form.targets).view(-1, *[1] * weights.ndim)
    tried = (unit * targets).round_().clamp_(form.lowest, form.highest)
    products, squares = (tried * unit).sum(-1), tried.square_().sum(-1).clamp_min_(1)
    best = (products.square() / squares).argmax(0, keepdim=True)
    scales = (top[..., 0] * (products / squares).gather(0, best)[0]).to(SCALE_DTYPE)
    wide = scales.to(weights.dtype)[..., None]
    return scales, torch.where(wide == 0, 0, weights / wide).round_().clamp_(form.lowest, form.highest)


def round_to_nearest(weight: torch.Tensor, form: ColumnFormat, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight [N, D] of any float dtype, each of its groups rounded by itself.

    Of several planes each one rounds what those before it leave.

    Args:
        where: what it is of, for the message.

    Raises:
        LarosaError: a weight is NaN or Inf, or too large for a scale.
    """
    outputs, inputs = weight.shape
    codes, scales = form.empty(outputs, inputs, weight.device)
    piece = _PIECE if weight.is_cpu else _PIECE_ELSEWHERE
    step = max(piece // (len(form.targets) * outputs), 1)
    for at in range(0, inputs, step):
        left = grouped(weight[:, at : at + step], form)
        for plane in range(form.planes):
            columns = slice(plane * inputs + at, plane * inputs + at + len(left))
            scales[columns], q = round_groups(left, form)
            codes[columns] = form.pack(q.flatten(1)[:, :outputs])
            if plane + 1 < form.planes:
                left = left - q * scales[columns, :, None].to(q)
    check_scales(scales, where)
    return codes, scales


def grouped(weight: torch.Tensor, form: ColumnFormat) -> torch.Tensor:
    """The columns of a weight [N, D] in groups, [D, groups, G] in float32 or wider, the last one filled with zeros."""
    columns = weight.T.to(torch.promote_types(weight.dtype, torch.float32))
    filling = form.groups(len(weight)) * form.group - len(weight)
    return torch.nn.functional.pad(columns, (0, filling)).unflatten(1, (-1, form.group))


def check_scales(scales: torch.Tensor, where: str) -> None:
    """Refuse the scales of weights that were no numbers.

    Raises:
        LarosaError: one is NaN or Inf.
    """
    if not scales.isfinite().all():
        raise LarosaError(f"{where}: a weight is NaN or Inf, or too large for a scale; is the checkpoint sound?")
