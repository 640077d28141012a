from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from larosa import LarosaError, PerSite
from larosa.config import SITES, Budget
from larosa.sparsity import SiteSizes, complete_alphas, keep_counts

COEFFICIENTS = st.floats(0.7, 1.2)


def sizes_of(family_config, hidden=4096, intermediate=11008, heads=32, kv_heads=32, model_type="llama", **more):
    return SiteSizes.of(
        family_config(
            model_type,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            **more,
        )
    )


@settings(max_examples=examples(50))
@given(COEFFICIENTS, COEFFICIENTS, st.integers(1, 6))
def test_paper_budget_satisfies_equations_17_and_18(family_config, alpha1, alpha3, ratio):
    alphas = complete_alphas(alpha1, alpha3, Budget.PAPER, sizes_of(family_config, 64, 64 * ratio, 4, 2))
    assert (alphas.h1, alphas.h3) == (alpha1, alpha3)
    assert 3 * alphas.h1 + alphas.h2 == pytest.approx(4, rel=1e-14)
    assert 2 * alphas.h3 + ratio * alphas.h4 == pytest.approx(2 + ratio, rel=1e-14)


@settings(max_examples=examples(50))
@given(COEFFICIENTS, COEFFICIENTS, st.sampled_from([1, 2, 4]), st.sampled_from([8, 16, 24]))
def test_weights_budget_skips_the_same_weights_as_all_ones(family_config, alpha1, alpha3, kv_heads, head_dim):
    sizes = sizes_of(family_config, 64, 150, 4, kv_heads, "qwen3", head_dim=head_dim)
    alphas = complete_alphas(alpha1, alpha3, Budget.WEIGHTS, sizes)
    # Sizes of the matrices written out: q, k, v and o; gate, up and down.
    queries, keys = 4 * head_dim, kv_heads * head_dim
    attention = {"h1": 64 * (queries + 2 * keys), "h2": queries * 64}
    mlp = {"h3": 64 * 2 * 150, "h4": 150 * 64}
    for block in (attention, mlp):
        assert sum(block[site] * alphas[site] for site in block) == pytest.approx(sum(block.values()), rel=1e-14)


# The paper's Table 11: coefficients of h1 to h4. Its 1.12 for M = 3.5 is 1.114 by its own equation 20, and the M it
# gives Qwen2.5-72B is the 7B's.
@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "kv_heads", "table"),
    [
        pytest.param(4096, 11008, 32, 32, (0.90, 1.30, 0.80, 1.15), id="LLaMA2-7B"),
        pytest.param(8192, 28672, 64, 8, (0.80, 1.60, 0.80, 1.12), id="LLaMA2-70B"),
        pytest.param(4096, 14336, 32, 8, (0.80, 1.60, 0.80, 1.12), id="LLaMA3-8B"),
        pytest.param(8192, 28672, 64, 8, (0.85, 1.45, 0.75, 1.14), id="LLaMA3-70B"),
        pytest.param(4096, 14336, 32, 8, (1.00, 1.00, 0.80, 1.12), id="Mistral-7B"),
        pytest.param(3584, 18944, 28, 4, (0.80, 1.60, 0.80, 1.08), id="Qwen2.5-7B"),
        pytest.param(8192, 29568, 64, 8, (0.80, 1.60, 0.80, 1.11), id="Qwen2.5-72B"),
    ],
)
def test_paper_budget_gives_table_11(family_config, hidden, intermediate, heads, kv_heads, table):
    sizes = sizes_of(family_config, hidden, intermediate, heads, kv_heads)
    alphas = complete_alphas(table[0], table[2], Budget.PAPER, sizes)
    assert [alphas[site] for site in SITES] == pytest.approx(table, abs=0.006)


def test_coefficient_scales_the_sparsity_as_in_table_5(family_config):
    # The formula in the paper's section 4.3 would drop 55% here.
    keep = keep_counts(0.5, PerSite(h1=0.90), sizes_of(family_config))
    assert f"{1 - keep.h1[0] / 4096:.1%}" == "45.0%"


@settings(max_examples=examples(100))
@given(st.floats(0, 0.8), st.lists(st.floats(0, 1.25), min_size=4, max_size=4), st.integers(1, 500))
def test_drops_the_whole_number_nearest_to_alpha_p_width(family_config, sparsity, alphas, intermediate):
    sizes = sizes_of(family_config, 96, intermediate, 4, 2, "qwen3", head_dim=10)
    keep = keep_counts(sparsity, PerSite(**dict(zip(SITES, alphas, strict=True))), sizes)
    for site, alpha, width in zip(SITES, alphas, (96, 40, 96, intermediate), strict=True):
        assert len(set(keep[site])) == 1
        assert len(keep[site]) == 3
        assert 0 <= keep[site][0] <= width
        assert abs((width - keep[site][0]) - alpha * sparsity * width) <= 0.5 + 1e-9


def test_more_sparsity_never_keeps_more(family_config):
    sizes = sizes_of(family_config, 32, 56, 4, 2)
    counts = [keep_counts(percent / 100, PerSite(), sizes) for percent in range(100)]
    for site in SITES:
        kept = [keep[site][0] for keep in counts]
        assert all(a >= b for a, b in pairwise(kept))
        assert kept[0] == sizes.width[site]


@pytest.mark.parametrize(("sparsity", "alpha"), [(0.9, 1.2), (0.5, 2.1), (0.5, -0.1)])
def test_refuses_a_site_sparsity_outside_0_to_1(family_config, sparsity, alpha):
    with pytest.raises(LarosaError, match="site h2"):
        keep_counts(sparsity, PerSite(h2=alpha), sizes_of(family_config))


def test_a_whole_site_may_be_dropped(family_config):
    assert keep_counts(0.5, PerSite(h3=2.0), sizes_of(family_config)).h3 == [0, 0, 0]
