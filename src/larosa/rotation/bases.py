"""Where the rotations come from: PCA of calibration activations, or chance as a control."""

from typing import NamedTuple

import torch


class LayerBases(NamedTuple):
    """The bases that one decoder layer works in, each [D, D] float64 with a basis vector a column.

    `attention` is the basis at h1 and of the attention's output, `mlp` the one at h3 and of the MLP's
    output; they are the same object except at rotation level `block`.
    """

    attention: torch.Tensor
    mlp: torch.Tensor


def principal_basis(second_moment: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a second moment, by descending eigenvalue (paper, section 4.2).

    Args:
        second_moment: [D, D], symmetric, float64. Not centred: the zero of an activation is what
            sparsity keeps fixed, so deviations are measured from it.

    Returns:
        [D, D] float64, orthogonal, one eigenvector a column, each with its largest entry positive so
        that the result does not depend on the eigensolver's choice of sign.
    """
    _, vectors = torch.linalg.eigh(second_moment)
    vectors = vectors.flip(-1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def random_basis(size: int, seed: int) -> torch.Tensor:
    """A Haar-distributed orthogonal matrix, [size, size] float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    # QR alone is not uniform over the orthogonal group; fixing the signs of R's diagonal makes it so.
    return Q * R.diagonal().sign()
