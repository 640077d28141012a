"""Where the rotations come from: PCA of calibration activations, or chance as a control."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

#: Rows converted to float64 at a time, so that no matrix needs a whole float64 copy.
_ROWS = 4096


class LayerBases(NamedTuple):
    """The bases that one decoder layer works in, each [D, D] float64 with a basis vector a column.

    `attention` is the basis at h1 and of the attention's output, `mlp` the one at h3 and of the MLP's
    output; they are the same object except at rotation level `block`, and None where the residual stream
    is not rotated. `values` has a basis for each key-value head, [keys, size, size], or is None likewise.
    """

    attention: torch.Tensor | None
    mlp: torch.Tensor | None
    values: torch.Tensor | None = None


def principal_basis(second_moment: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a second moment, by descending eigenvalue (paper, section 4.2).

    Args:
        second_moment: [..., D, D], symmetric, float64. Not centred: the zero of an activation is what
            sparsity keeps fixed, so deviations are measured from it.

    Returns:
        [..., D, D] float64, orthogonal, one eigenvector a column, each with its largest entry positive so
        that the result does not depend on the eigensolver's choice of sign.
    """
    _, vectors = torch.linalg.eigh(second_moment)
    vectors = vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * largest.sign()


def output_aware(second_moment: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """C / tr C + G / tr G: what to take the principal basis of where outputs count beside inputs.

    Args:
        second_moment: C of the activations, [..., D, D].
        gram: what a change of them does, [..., D, D]: G = sum of W^T W over the linears that read them (see
            `reader_gram`), or their Fisher information.
    """
    return _unit_trace(second_moment) + _unit_trace(gram)


def _unit_trace(matrix: torch.Tensor) -> torch.Tensor:
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return matrix / trace.clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, None]


@torch.no_grad()
def reader_gram(weights: Iterable[torch.Tensor], gain: torch.Tensor) -> torch.Tensor:
    """Sum of W^T W over linears [out, D] behind a norm, the norm's gain folded into them, [D, D] float64."""
    gram = gain.new_zeros(len(gain), len(gain), dtype=torch.float64)
    for weight in weights:
        for rows in weight.split(_ROWS):
            wide = rows.double()
            gram.addmm_(wide.T, wide)
    return gain.double()[:, None] * gram * gain.double()


def random_basis(size: int, seed: int) -> torch.Tensor:
    """A Haar-distributed orthogonal matrix, [size, size] float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    # QR alone is not uniform over the orthogonal group; fixing the signs of R's diagonal makes it so.
    return Q * R.diagonal().sign()
