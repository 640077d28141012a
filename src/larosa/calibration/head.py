"""What an entry of the language-model head's input is worth: the divergence that the predictions move by without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    tokens = torch.cat([hidden[0].float() for hidden in outputs]).to(device).split(_POSITIONS)
    pieces = weight.split(max(_PIECE // weight.shape[1], 1))
    score = _apart(tokens, pieces)
    return (score * _coherence(tokens, pieces, score)).to(weight.device)


def _apart(tokens: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """For each entry the root of the mean over the tokens of the variance that its column has under p."""
    squares = torch.zeros(tokens[0].shape[1], dtype=torch.float64, device=tokens[0].device)
    for x in tokens:
        p, mean, mean_square = _logits(x, pieces).softmax(-1), torch.zeros_like(x), torch.zeros_like(x)
        for of_piece, piece in zip(p.split([len(piece) for piece in pieces], dim=1), pieces, strict=True):
            wide = piece.to(x)
            mean += of_piece @ wide
            mean_square += of_piece @ wide.square()
        squares += (mean_square - mean.square()).clamp_min(0).double().sum(0)
    return (squares / sum(map(len, tokens))).sqrt()


def _coherence(tokens: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor], score: torch.Tensor) -> torch.Tensor:
    """How much larger than by its scores the effect of what is dropped is, as a root; 1 where nothing is."""
    apart = together = torch.zeros_like(score[0])
    kept = len(score) - round(_PROBE * len(score))
    for x in tokens:
        p, lost = _logits(x, pieces).softmax(-1), x - keep_top_k(x, kept, score.float())
        moved = _logits(lost, pieces)
        together = together + ((p * moved.square()).sum(1) - (p * moved).sum(1).square()).double().sum()
        apart = apart + (lost.double() * score).square().sum()
    return (together / apart).sqrt() if apart > 0 else torch.ones_like(apart)


def _logits(x: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a head of these rows gives x [N, D], in float32 where x is."""
    return torch.cat([x @ piece.to(x).T for piece in pieces], dim=1)
