"""Codes and scales against loops in Python, and bytes written down by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from larosa import LarosaError
from larosa.formats import GROUPS, SCALE_DTYPE, Int4, Int5, Int6, Int8

FORMATS = (Int4, Int5, Int6, Int8)


@st.composite
def stored(draw):
    """A format, and q [D, N] with scales [D, groups] for it; N around whole numbers of groups, bytes and neither."""
    form = draw(st.sampled_from(FORMATS))(draw(st.sampled_from(GROUPS)))
    inputs, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 2 * form.group + 2))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randint(form.lowest, form.highest + 1, (inputs, outputs), generator=chance)
    scales = torch.randn(inputs, math.ceil(outputs / form.group), generator=chance).to(SCALE_DTYPE)
    return form, q, scales


@given(stored())
def test_whole_numbers_come_back(case):
    form, q, scales = case
    codes = form.pack(q)
    assert form.unpack(codes, q.shape[1]).tolist() == q.tolist()
    empty = form.empty(q.shape[1], len(q))
    assert [(t.shape, t.dtype) for t in (codes, scales)] == [(t.shape, t.dtype) for t in empty]
    assert (codes.nbytes + scales.nbytes) == len(q) * form.column_bytes(q.shape[1])


@given(stored())
def test_weights_are_scales_times_whole_numbers(case):
    form, q, scales = case
    expected = [[float(scales[d, n // form.group]) * int(q[d, n]) for n in range(q.shape[1])] for d in range(len(q))]
    codes = form.pack(q)
    for dtype in (torch.float64, torch.float32):  # exact in both
        assert form.dequantize(codes, scales, q.shape[1], dtype).tolist() == expected
    rounded = torch.tensor(expected, dtype=torch.float64).to(torch.bfloat16)
    assert torch.equal(form.dequantize(codes, scales, q.shape[1], torch.bfloat16), rounded)


def test_more_columns_than_are_dequantized_at_a_time():
    q = torch.arange(2500)[:, None] % 16 - 8
    weight = Int4(32).dequantize(Int4(32).pack(q), torch.ones(2500, 1, dtype=SCALE_DTYPE), 1, torch.float32)
    assert weight.tolist() == q.tolist()


def test_bytes():
    """What other readers of a checkpoint rely on."""
    assert Int4(32).pack(torch.tensor([[-8, 7, 1], [0, -1, 3]])).tolist() == [[0xF0, 0x89], [0x78, 0x8B]]
    assert Int8(32).pack(torch.tensor([[-127, 127, 1]])).tolist() == [[-127, 127, 1]]
    # Codes 0 and 63 in byte 0, with leading bits 00 and 11; 33 in byte 8, whose leading bits stand above those.
    q = torch.zeros(1, 34)
    q[0, :2], q[0, 16], q[0, 33] = torch.tensor([-32, 31]), 1, -1
    first = [0xF0, *[0] * 7, 0x01, *[0] * 7, 0xAC, *[0xAA] * 7]
    assert Int6(32).pack(q).tolist() == [[*first, 0xF0, *[0] * 15, 0xA6, *[0xAA] * 7]]
    # Codes 0 and 31 in byte 0, 15 in byte 4 and 0 in byte 15: in places 0, 1 and 3 of the leading bits.
    q = torch.zeros(1, 32)
    q[0, :2], q[0, 8], q[0, 31] = torch.tensor([-16, 15]), -1, -16
    assert Int5(32).pack(q).tolist() == [[0xF0, *[0] * 3, 0x0F, *[0] * 11, 0xFA, 0xFF, 0xFF, 0x7F]]


@pytest.mark.parametrize("group", [0, -32, 16, 33, 96, 256])
def test_other_groups(group):
    with pytest.raises(LarosaError, match=f"a weight group of {group}: one of 32, 64, 128"):
        Int4(group)
