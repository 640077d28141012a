"""What the Fisher information of a layer's activations says in the basis that the layer works in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from larosa.architectures import Architecture, Heads
from larosa.calibration import LayerFisher
from larosa.rotation.adapters import LayerFrames


class UnitFisher:
    """A layer's Fisher information, at h1 and h3 of the norm's output before its gain: what gets rotated."""

    def __init__(
        self,
        layer: torch.nn.Module,
        architecture: Architecture,
        read: Callable[[], LayerFisher],
        heads: Heads,
        device: torch.device,
    ) -> None:
        """Take the gains of a dense layer's norms; `read` is called for each result, wanted on `device`."""
        self._read = read
        self._heads = heads
        self._device = device
        # Copies, as the norms lose their gains when the layer is rotated.
        gains = {site: architecture.norm(layer, site).weight.detach() for site in ("h1", "h3")}
        self._gains = {site: gain.to(device, torch.float64, copy=True) for site, gain in gains.items()}

    def unit(self, site: str) -> torch.Tensor:
        """H of site h1 or h3, [D, D] float64 where the layer is; for sites that are rotated."""
        gain = self._gains[site]
        H: torch.Tensor = getattr(self._read(), site)
        return gain[:, None] * H.to(self._device) * gain

    @property
    def value_moments(self) -> torch.Tensor:
        """mean(a^T a) of what the query heads of each key-value head give, [keys, size, size]."""
        return self._read().values.to(self._device)

    @property
    def values(self) -> torch.Tensor:
        """H of what the query heads of each key-value head give, [keys, size, size]."""
        heads = self._heads
        return self._read().h2.to(self._device).unflatten(0, (heads.keys, heads.group)).mean(1)

    def scores(self, frames: LayerFrames) -> dict[str, torch.Tensor]:
        """For each site the square root of H's diagonal in the coordinates of `frames`, [width] float64.

        An entry's square times its score's square is, but for a factor of 2, the divergence that its loss causes.
        """
        squares = {"h4": self._read().h4}
        for site, frame in (("h1", frames.attention), ("h3", frames.mlp)):
            # Without a rotation the norm's gain stays where it is, on the activation's side.
            H = getattr(self._read(), site)
            squares[site] = (
                (H if H.dim() == 1 else H.diagonal()) if frame is None else _diagonal(self.unit(site), frame.dual)
            )
        h2 = self._read().h2.to(self._device)
        if frames.values is None:
            squares["h2"] = h2.diagonal(dim1=-2, dim2=-1).flatten()
        else:
            squares["h2"] = _diagonal(h2, frames.values.repeat_interleave(self._heads.group, 0)).flatten()
        return {site: square.clamp_min(0).sqrt() for site, square in squares.items()}


def _diagonal(H: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """The diagonal of Q^T H Q, [..., D]."""
    Q = Q.to(H)
    return (Q * (H @ Q)).sum(-2)
