"""How products and attention are divided: all blocks at once where sizes allow it, and every output once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from larosa.ops.cuda.launch import Machine
from larosa.ops.cuda.plan import (
    above_plan,
    alone_plan,
    attend_plan,
    cut_plan,
    fused_plan,
    linear_plan,
    low_bit_plan,
    sparse_plan,
    swiglu_plan,
    together,
)

from .conftest import SMALL_H200

H200 = Machine((9, 0), 132, 232448)
A100 = Machine((8, 0), 108, 166912)


@pytest.mark.parametrize(
    ("outputs", "k"),
    [
        ([4096, 4096, 4096], 2048),
        ([4096], 2048),
        ([11008, 11008], 2048),
        ([4096], 5504),
        ([4096, 1024, 1024], 2048),
        ([14336, 14336], 2048),
        ([4096], 7168),
        ([3584], 9472),
        ([18944, 18944], 1792),
    ],
)
def test_7b_products_fill_an_h200_in_one_round(outputs, k):
    plan = sparse_plan(H200, outputs, k, 2)
    blocks = plan.cluster * sum(-(-size // plan.tile) for size in outputs)
    assert 0.7 * 132 <= blocks <= 2 * 132
    assert plan.tile * 2 >= 128, "pieces of memory as wide as that"


@given(
    st.sampled_from([H200, A100]),
    st.lists(st.integers(1, 40000), min_size=1, max_size=4),
    st.integers(0, 32768),
    st.sampled_from([2, 4]),
)
def test_any_product_has_a_plan(gpu, outputs, k, element_size):
    plan = sparse_plan(gpu, outputs, k, element_size)
    assert plan.lanes in (4, 8, 16, 32)
    assert plan.tile == plan.lanes * 16 // element_size
    assert plan.cluster in ((1, 2, 4, 8) if gpu.overlaps else (1,))
    assert plan.tile % plan.cluster == 0


@given(
    st.sampled_from([H200, A100]),
    st.lists(st.integers(1, 40000), min_size=1, max_size=4),
    st.integers(1, 8192),
    st.sampled_from([2, 4]),
)
def test_blocks_that_select_for_themselves_have_a_multiprocessor_each(gpu, outputs, k, element_size):
    for plan in (
        fused_plan(gpu, outputs, k, element_size),
        alone_plan(gpu, outputs, k, element_size),
        swiglu_plan(gpu, 2 * outputs[0], k, element_size),
    ):
        if plan is not None:
            assert plan.tile == plan.lanes * 16 // element_size <= 512
            assert plan.lanes % 4 == 0
    for plan in (fused_plan(gpu, outputs, k, element_size), alone_plan(gpu, outputs, k, element_size)):
        if plan is not None:
            blocks = plan.cluster * sum(-(-size // plan.tile) for size in outputs)
            assert 0.7 * gpu.multiprocessors <= blocks <= gpu.multiprocessors


def test_small_cases_of_the_tests_take_the_same_ways():
    """Those of test_products.py and test_top_k_linear.py on the GPU that stands in for a large one."""
    for element_size in (2, 4):
        assert alone_plan(SMALL_H200, [200], 350, element_size)
        assert alone_plan(SMALL_H200, [200], 12999, element_size)
        for outputs in (192, 180):
            assert above_plan(SMALL_H200, [outputs], 16384, element_size, swiglu=False, carries=True)
        for outputs, width, k in ((192, 16384, 16000), (192, 30, 1), (180, 3001, 1000), (161, 3000, 0)):
            assert cut_plan(SMALL_H200, [outputs], width, k, element_size)
        assert swiglu_plan(SMALL_H200, 2 * 96, 350, element_size)


def test_products_of_7b_models_select_for_themselves():
    for outputs in ([4096, 4096, 4096], [4096], [4096, 1024, 1024], [3584, 512, 512], [3584]):
        assert fused_plan(H200, outputs, 3072, 2)
    for intermediate in (11008, 14336, 18944):
        plan = swiglu_plan(H200, 2 * intermediate, 2048, 2)
        assert 0.9 * 132 <= plan.cluster * -(-intermediate // (plan.tile // 2)) < 132, "one for the next selection"
    assert alone_plan(H200, [4096], 5504, 2).cluster == 2
    for k in (5504, 7168):
        assert cut_plan(H200, [4096], 14336, k, 2) == alone_plan(H200, [4096], k, 2)
    assert alone_plan(H200, [11008, 11008], 2048, 2) is None


def test_products_of_7b_models_compare_for_themselves():
    alone = {"swiglu": False, "carries": False}
    for outputs, width in (([4096] * 3, 4096), ([4096, 1024, 1024], 4096), ([4096], 4096), ([3584], 3584)):
        assert above_plan(H200, outputs, width, 2, **alone)
    for hidden, intermediate in ((4096, 11008), (4096, 14336), (3584, 18944)):
        plan = above_plan(H200, [intermediate] * 2, hidden, 2, swiglu=True, carries=False)
        assert 0.9 * 132 <= plan.cluster * -(-intermediate // (plan.tile // 2)) <= 132
    for carries in (False, True):
        plan = above_plan(H200, [4096], 14336, 2, swiglu=False, carries=carries)
        assert (plan.lanes, plan.cluster) == (8, 2), "one block's list of all entries would take too much memory"


@given(
    st.sampled_from([H200, A100]),
    st.lists(st.integers(1, 40000), min_size=1, max_size=4),
    st.integers(0, 32768),
    st.sampled_from([16, 32]),
    st.integers(0, 16384),
)
def test_any_product_of_codes_has_a_plan(gpu, outputs, k, width, selected):
    plan = low_bit_plan(gpu, outputs, k, width)
    assert plan.tile == plan.lanes * width <= 512
    assert plan.lanes % 2 == 0
    assert plan.cluster in ((1, 2, 4, 8) if gpu.overlaps else (1,))
    alone = low_bit_plan(gpu, outputs, k, width, selected)
    if selected and alone is not None:
        assert alone.cluster * sum(-(-size // alone.tile) for size in outputs) <= gpu.multiprocessors


@pytest.mark.parametrize(
    ("outputs", "k"),
    [
        *(([4096, 1024, 1024], 4096), ([4096], 4096), ([14336] * 2, 2048), ([4096], 14336), ([4096] * 3, 4096)),
        # Of two columns an entry, as long as Llama-3-8B and -70B have them where blocks select for themselves.
        *(([4096], 28672), ([14336] * 2, 8192), ([8192, 1024, 1024], 16384), ([8192], 16384)),
    ],
)
def test_products_of_codes_fill_an_h200_in_one_round(outputs, k):
    plan = low_bit_plan(H200, outputs, k, 32, k)
    clusters = sum(-(-size // plan.tile) for size in outputs)
    assert 0.65 * 132 <= plan.cluster * clusters <= 132
    assert plan.cluster < 8 or clusters <= 12, "more of so large ones do not run at once"


@given(st.sampled_from([H200, A100]), st.integers(1, 16), st.integers(1, 16), st.integers(1, 100_000))
def test_any_attention_has_a_plan(gpu, key_heads, group, length):
    plan = attend_plan(gpu, key_heads * group, key_heads, length)
    assert group % plan.heads == 0
    assert 1 <= plan.heads <= 8
    assert plan.cluster in ((1, 2, 4, 8) if gpu.overlaps else (1,))


def test_dense_products_run_in_one_round():
    plan = linear_plan(H200, 1)
    assert plan.blocks(H200, 256) == 256
    assert plan.blocks(H200, 2000) == 396


@pytest.mark.parametrize("gpu", [H200, A100, Machine((8, 6), 84, 101376)])
def test_rows_of_dense_products_fit_a_block(gpu):
    """In chunks of a multiple of the entries that a warp reads at once."""
    assert [together(width) for width in (4, 8, 16, 32)] == [8, 8, 4, 2]
    for rows in range(1, together(8) + 1):
        plan = linear_plan(gpu, rows)
        assert 4 * rows * plan.chunk <= gpu.shared_memory
        assert plan.chunk >= 2048
        assert plan.chunk % 256 == 0
