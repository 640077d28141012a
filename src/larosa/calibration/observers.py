"""What is remembered of the activations that pass by while a layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from larosa.architectures.base import Heads
from larosa.errors import LarosaError
from larosa.utils import finite

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def attached(*handles: Any) -> Iterator[None]:
    """Detach hooks at the end, whatever happens in between."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def behind(first: int, see: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """`see` for all tokens of x [..., positions, D] but the first so many, which stay dense."""
    return lambda x: see(x[..., first:, :])


class SecondMoment:
    """mean(x^T x) of the activations seen, not centred (paper, equation 7).

    Products within one x are taken in float32 or wider, sums over them in float64.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._sum: torch.Tensor | None = None
        self._tokens = 0

    def see(self, x: torch.Tensor) -> None:
        """Add the tokens of x [..., D]."""
        x = x.flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        product = (x.T @ x).double()
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._tokens += len(x)

    def finish(self) -> torch.Tensor:
        """The mean, [D, D] float64.

        Raises:
            LarosaError: an activation was NaN or Inf.
        """
        assert self._sum is not None, "the layer has run"
        if not self._sum.isfinite().all():
            raise not_finite(self._where)
        return self._sum / self._tokens


class HeadMoments:
    """mean(a^T a) of each key-value head, over the tokens seen and the query heads that share it, in float64."""

    def __init__(self, where: str, heads: Heads) -> None:
        self._moment = [SecondMoment(where) for _ in range(heads.keys)]
        self._heads = heads

    def see(self, x: torch.Tensor) -> None:
        """Add the tokens of x [..., heads x size], an attention's output before its projection."""
        by_head = x.flatten(0, -2).unflatten(-1, self._heads).transpose(0, 1)
        for moment, head in zip(self._moment, by_head, strict=True):
            moment.see(head)

    def finish(self) -> torch.Tensor:
        """The means, [keys, size, size] float64.

        Raises:
            LarosaError: an activation was NaN or Inf.
        """
        return torch.stack([moment.finish() for moment in self._moment])


class MeanSquare:
    """mean(x^2) of each entry of the activations seen, in float64: the diagonal of their second moment."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._sum: torch.Tensor | float = 0.0
        self._tokens = 0

    def see(self, x: torch.Tensor) -> None:
        """Add the tokens of x [..., D]."""
        x = x.flatten(0, -2).double()
        self._sum = self._sum + x.square().sum(0)
        self._tokens += len(x)

    def finish(self) -> torch.Tensor:
        """The mean, [D] float64.

        Raises:
            LarosaError: an activation was NaN or Inf.
        """
        assert isinstance(self._sum, torch.Tensor), "the layer has run"
        if not self._sum.isfinite().all():
            raise not_finite(self._where)
        return self._sum / self._tokens


class Magnitudes:
    """The magnitudes of all activations seen at one site of one layer, for exact quantiles of them."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._parts: list[torch.Tensor] = []

    def see(self, x: torch.Tensor) -> None:
        """Add the entries of x [..., D]."""
        self._parts.append(x.abs().flatten())

    def finish(self) -> SortedMagnitudes:
        """All entries in order.

        Raises:
            LarosaError: an activation was NaN or Inf.
        """
        assert self._parts, "the layer has run"
        values = torch.cat(self._parts)
        self._parts.clear()
        # Read as integers, non-negative floats sort alike, with NaN on top; numpy sorts those many times faster.
        bits = values.view(_BITS[values.element_size()])
        if bits.is_cuda:
            bits.copy_(bits.sort().values)
        else:
            bits.numpy().sort()
        if not values[-1].isfinite():
            raise not_finite(self._where)
        return SortedMagnitudes(values)


class SortedMagnitudes:
    """Exact quantiles of a site's magnitudes."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def threshold(self, share: float) -> float:
        """The magnitude up to which entries must be dropped to drop `share` of them; 0 for none.

        It is one of the magnitudes seen, the round(share * N)-th smallest of N, never a number between
        two: it stays exact in the model's own dtype.
        """
        rank = round(share * len(self._values))
        return float(self._values[rank - 1]) if rank else 0.0

    def dropped(self, threshold: float) -> float:
        """The share of the entries that are not above a threshold; ties make it exceed what was asked for."""
        probe = torch.tensor(threshold, dtype=self._values.dtype, device=self._values.device)
        return int(torch.searchsorted(self._values, probe, right=True)) / len(self._values)


def not_finite(where: str) -> LarosaError:
    """The error of a calibration that meets NaN or Inf somewhere."""
    return finite.not_finite(f"{where}: calibration activations are")
