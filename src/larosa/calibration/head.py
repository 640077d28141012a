"""What an entry of the language-model head's input is worth: the divergence that the predictions move by without it."""

from __future__ import annotations

import math
from typing import Any

import torch

from larosa.architectures import Architecture
from larosa.calibration.layers import decoder_outputs
from larosa.ops import keep_top_k
from larosa.utils.progress import track

#: Tokens that means are taken over, at least; they settle early.
_TOKENS = 4096

#: Of them, those whose logits are held at a time, to bound memory on large vocabularies.
_POSITIONS = 512

#: Weights that are widened at a time.
_PIECE = 2**26

#: The share of entries that is dropped to see how much errors of different ones add up to.
_PROBE = 0.5


@torch.no_grad()
def head_scores(model: Any, architecture: Architecture, sequences: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A score for each entry of the head's input: its square times the entry's is about twice the divergence without.

    With predictions p and an error d of the input, the divergence is half the variance under p of what d does to the
    logits, d W^T, but for higher orders. The scores are those of each entry alone, in the mean over the calibration
    tokens, times one number for all: with half of the entries dropped their estimate is what that gives.

    Args:
        model: its head is in the model's own dtype.
        sequences: [number, length] token ids, of which the first few thousand tokens are looked at.
        device: where to compute.

    Returns:
        [D] float64 on the model's device.
    """
    weight = architecture.head(model).weight
    few = sequences[: math.ceil(_TOKENS / sequences.shape[1])]
    outputs = track(decoder_outputs(model, architecture, few), "Scores of the head", total=len(few))
    tokens = torch.cat([hidden[0].float() for hidden in outputs])
    pieces = weight.split(max(_PIECE // weight.shape[1], 1))
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=device)
    for x in tokens.split(_POSITIONS):
        p = _predictions(x, pieces, device)
        mean_square, mean = torch.zeros_like(x, device=device), torch.zeros_like(x, device=device)
        for of_piece, part in zip(p.split([len(part) for part in pieces], dim=1), pieces, strict=True):
            wide = part.to(device, torch.float32)
            mean += of_piece @ wide
            mean_square += of_piece @ wide.square()
        squares += (mean_square - mean.square()).clamp_min(0).double().sum(0)
    score = (squares / len(tokens)).sqrt()
    apart = together = torch.zeros((), dtype=torch.float64, device=device)
    dropped = round(_PROBE * len(score))
    for x in tokens.split(_POSITIONS):
        p, x = _predictions(x, pieces, device), x.to(device)
        lost = x - keep_top_k(x, len(score) - dropped, score.float())
        moved = torch.cat([lost @ part.to(device, torch.float32).T for part in pieces], dim=1)
        variance = (p * moved.square()).sum(1) - (p * moved).sum(1).square()
        together = together + variance.double().sum()
        apart = apart + (lost.double() * score).square().sum()
    ratio = together / apart if apart > 0 else torch.ones_like(apart)
    return (score * ratio.sqrt()).to(weight.device)


def _predictions(x: torch.Tensor, pieces: tuple[torch.Tensor, ...], device: torch.device) -> torch.Tensor:
    """The probabilities [N, vocabulary] that a head of these rows gives x [N, D]."""
    x = x.to(device)
    return torch.cat([x @ part.to(device, torch.float32).T for part in pieces], dim=1).softmax(-1)
