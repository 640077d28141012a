"""How far a model's predictions move with its activations: second moments of gradients, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from larosa.architectures import Architecture, Heads
from larosa.calibration.layers import visit_layers_backwards
from larosa.calibration.observers import HeadMoments, MeanSquare, SecondMoment, attached, behind
from larosa.calibration.precision import float32_arithmetic
from larosa.calibration.shelf import Shelf
from larosa.utils.progress import track

#: Positions whose logits are held at a time, to bound memory on large vocabularies.
_POSITIONS = 512


class LayerFisher(NamedTuple):
    """mean(g^T g) over all calibration tokens, g being the gradient of the loss at what a site's linears read.

    The loss is -log p(y), summed over the tokens, of tokens y drawn from the model's own predictions p. For a
    small change d of an activation, d H d^T / 2 is then the divergence of the predictions of this and all
    later tokens. `h1` and `h3` [D, D] have the norm's gain on the activation's side; where nothing will rotate them
    there is the diagonal alone, [D]. `h2` has one [size, size] for each query head; of `h4` there is the diagonal,
    [intermediate]. `values` is not of gradients but of the activations: `LayerStatistics.values` of the same tokens.
    All are float64, on the CPU.
    """

    h1: torch.Tensor
    h2: torch.Tensor
    h3: torch.Tensor
    h4: torch.Tensor
    values: torch.Tensor


_SITES = ("h1", "h2", "h3", "h4")


class Fisher:
    """Every layer's Fisher information, first layer first, read from disk when it is asked for."""

    def __init__(self, backwards: Shelf) -> None:
        self._backwards = backwards

    def __len__(self) -> int:
        return len(self._backwards)

    def __getitem__(self, layer: int) -> LayerFisher:
        return LayerFisher(**self._backwards[range(len(self))[::-1][layer]])

    def __iter__(self) -> Iterator[LayerFisher]:
        return (self[layer] for layer in range(len(self)))


def layer_fisher(
    model: Any,
    architecture: Architecture,
    sequences: torch.Tensor,
    device: torch.device,
    seed: int,
    first: int = 0,
    rotated: bool = True,
) -> Fisher:
    """Every layer's Fisher information, first layer first, from one pass forwards and one backwards.

    Arguments are as for `visit_layers`; `seed` is of the tokens drawn, `first` how many tokens of each sequence are
    left out, because they stay dense, and `rotated` says whether `h1` and `h3` will be, and need whole matrices.

    Raises:
        LarosaError: a gradient is NaN or Inf, and the message names layer and site; or the disk is full.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = Heads.of(model.config)
    queries = Heads(keys=heads.keys * heads.group, group=1, size=heads.size)
    backwards = Shelf()
    visits = visit_layers_backwards(
        model, architecture, sequences, device, lambda hidden: loss_gradient(model, architecture, hidden, generator)
    )
    for visit in track(visits, "Gradients", total=len(architecture.layers(model))):
        where = {site: f"layer {visit.index}, site {site}, gradients" for site in _SITES}
        residual = SecondMoment if rotated else MeanSquare
        observers: dict[str, SecondMoment | HeadMoments | MeanSquare] = {
            "h1": residual(where["h1"]),
            "h2": HeadMoments(where["h2"], queries),
            "h3": residual(where["h3"]),
            "h4": MeanSquare(where["h4"]),
        }
        values = HeadMoments(f"layer {visit.index}, site h2", heads)
        taps = {site: behind(first, observer.see) for site, observer in observers.items()}
        # Going back runs the layer forwards once more: the activations pass by here too.
        with attached(
            architecture.tap(visit.layer, "h2", _detached(behind(first, values.see))),
            *(_tap_gradient(architecture, visit.layer, site, see) for site, see in taps.items()),
        ):
            visit.outputs()
        found = {site: observer.finish() for site, observer in observers.items()}
        backwards.append({**found, "values": values.finish()})
    return Fisher(backwards)


def _detached(see: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    return lambda x: see(x.detach())


def _tap_gradient(architecture: Architecture, layer: Any, site: str, see: Callable[[torch.Tensor], None]) -> Any:
    def tap(x: torch.Tensor) -> None:
        x.register_hook(see)

    return architecture.tap(layer, site, tap)


def loss_gradient(
    model: Any, architecture: Architecture, hidden: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The gradient of -log p(y) of tokens y drawn from p, with respect to the last layer's output [1, T, D]."""
    norm, head = architecture.final_norm(model), architecture.head(model)
    parts = []
    for part in hidden.split(_POSITIONS, dim=1):
        with torch.enable_grad(), float32_arithmetic(head, part.device):
            part = part.detach().to(norm.weight.device).requires_grad_()
            logits = head(norm(part).to(head.weight.device))
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            loss = -log_p.gather(-1, _draw(log_p.detach(), generator)).sum()
        (gradient,) = torch.autograd.grad(loss, part)
        parts.append(gradient.to(hidden))
    return torch.cat(parts, dim=1)


def _draw(log_p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each distribution log_p [..., vocabulary], [..., 1], by chances drawn on the CPU."""
    total = log_p.exp().cumsum(-1)
    chance = torch.rand(*log_p.shape[:-1], 1, generator=generator, dtype=torch.float64).to(total)
    # The sum is 1 but for rounding. Right of equals, so that no token of probability 0 is drawn.
    drawn = torch.searchsorted(total, chance * total[..., -1:], right=True)
    return drawn.clamp_max(log_p.shape[-1] - 1)
