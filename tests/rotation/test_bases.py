import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from larosa.rotation import output_aware, principal_basis, random_basis, reader_gram


def second_moment(seed, size, tokens):
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.linspace(0.1, 2, size)
    return x.T @ x / tokens


def assert_orthogonal(Q):
    identity = torch.eye(len(Q), dtype=torch.float64)
    torch.testing.assert_close(Q.T @ Q, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(Q @ Q.T, identity, rtol=0, atol=1e-12)


# Fewer tokens than entries make the moment singular, as a short calibration does.
MOMENTS = st.builds(second_moment, st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([3, 200]))


@settings(max_examples=examples(40))
@given(MOMENTS)
def test_principal_basis_diagonalises_in_descending_order(C):
    Q = principal_basis(C)
    assert Q.dtype == torch.float64
    assert_orthogonal(Q)
    rotated = Q.T @ C @ Q
    variances = rotated.diagonal()
    torch.testing.assert_close(rotated, variances.diag(), rtol=0, atol=1e-12 * float(C.abs().max()) * len(C))
    assert bool((variances.diff() <= 1e-12 * variances.max()).all())


@settings(max_examples=examples(40))
@given(MOMENTS)
def test_signs_do_not_depend_on_the_eigensolver(C):
    Q = principal_basis(C)
    assert bool((Q.gather(0, Q.abs().argmax(0, keepdim=True)) > 0).all())


def test_first_vector_is_the_direction_of_largest_second_moment():
    # Not centred: a constant activation is all signal here, and would be nothing to a centred PCA.
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64).expand(10, 2)
    Q = principal_basis(x.T @ x / 10)
    torch.testing.assert_close(Q[:, 0], torch.tensor([0.6, 0.8], dtype=torch.float64))


@settings(max_examples=examples(20))
@given(st.integers(1, 50), st.integers(0, 2**31))
def test_random_basis_is_orthogonal(size, seed):
    assert_orthogonal(random_basis(size, seed))


def test_random_basis_follows_its_seed_alone():
    torch.manual_seed(1)
    first = random_basis(8, 5)
    torch.manual_seed(2)
    assert torch.equal(random_basis(8, 5), first)
    assert not torch.allclose(random_basis(8, 6), first)


@pytest.mark.parametrize("entry", [(0, 0), (3, 3), (1, 2)])
def test_random_basis_is_uniform(entry):
    # Under the Haar measure every entry has mean 0 and variance 1 / size; plain QR has biased diagonals.
    samples = torch.stack([random_basis(4, seed)[entry] for seed in range(1000)])
    assert abs(float(samples.mean())) < 5 * (0.25 / 1000) ** 0.5
    assert float(samples.square().mean()) == pytest.approx(0.25, abs=0.05)


def test_a_stack_of_moments_gives_a_stack_of_bases():
    moments = torch.stack([second_moment(seed, 6, 50) for seed in range(3)])
    for Q, C in zip(principal_basis(moments), moments, strict=True):
        torch.testing.assert_close(Q, principal_basis(C))


def test_output_aware_weighs_both_parts_alike_whatever_their_scales():
    C, G = second_moment(0, 5, 40), second_moment(1, 5, 40)
    both = output_aware(C, G)
    torch.testing.assert_close(both, C / C.diagonal().sum() + G / G.diagonal().sum())
    torch.testing.assert_close(output_aware(1e6 * C, 1e-6 * G), both)
    torch.testing.assert_close(output_aware(C, torch.zeros_like(G)), C / C.diagonal().sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gram_of_the_readers_is_of_the_folded_weights(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 7, generator=generator).to(dtype) for rows in (5, 5000)]
    gain = torch.randn(7, generator=generator).to(dtype)
    folded = torch.cat(weights).double() @ gain.double().diag()
    torch.testing.assert_close(reader_gram(weights, gain), folded.T @ folded)
