import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.config import SITES, PerSite
from larosa.models import selectors, set_keep_counts
from larosa.sparsity import SiteSizes, keep_counts
from larosa.sparsity.search import SearchLog
from larosa.sparsity.sensitivity import LEAST_KEPT, PROBE, allocate, cheapest, sorted_entries

SIZES = SiteSizes(
    layers=2,
    hidden=6,
    vocabulary=9,
    attention_width=4,
    width={"h1": 6, "h2": 4, "h3": 6, "h4": 9},
    matrices={"h1": (4, 2, 2), "h2": (6,), "h3": (9, 9), "h4": (6,)},
)
PLACES = [(layer, site) for layer in range(2) for site in SITES]


def in_order_of_price(sparsity, costs):
    """Drop the cheapest next entry of any site that still fits the budget, one by one."""
    left = round(sparsity * SIZES.linear_weights)
    steps = sorted(
        (float(cost) / SIZES.outputs[place[1]], number, j)
        for number, place in enumerate(PLACES)
        for j, cost in enumerate(costs[place])
        if j < int(len(costs[place]) * max(1 - LEAST_KEPT, sparsity))
    )
    dropped, full = dict.fromkeys(PLACES, 0), set()
    for _, number, _ in steps:
        place = PLACES[number]
        if place not in full and SIZES.outputs[place[1]] <= left:
            dropped[place] += 1
            left -= SIZES.outputs[place[1]]
        else:
            full.add(place)
    return {site: [SIZES.width[site] - dropped[layer, site] for layer in range(2)] for site in SITES}


@st.composite
def costs(draw):
    numbers = st.one_of(st.integers(0, 3).map(float), st.floats(0, 10, width=32))
    return {
        (layer, site): torch.tensor(
            sorted(draw(st.lists(numbers, min_size=SIZES.width[site], max_size=SIZES.width[site]))), dtype=torch.float64
        )
        for layer, site in PLACES
    }


@settings(max_examples=examples(150))
@given(costs(), st.floats(0, 0.99))
def test_drops_what_is_cheapest_per_weight_within_the_budget(example, sparsity):
    keep = cheapest(sparsity, SIZES, example)
    assert keep.model_dump() == in_order_of_price(sparsity, example)
    skipped = sum((SIZES.width[site] - k) * SIZES.outputs[site] for site in SITES for k in keep[site])
    assert skipped <= round(sparsity * SIZES.linear_weights)


def test_the_budget_is_met_to_less_than_a_column():
    generator = torch.Generator().manual_seed(0)
    example = {p: torch.rand(SIZES.width[p[1]], generator=generator).double().sort().values for p in PLACES}
    for sparsity in (0.1, 0.25, 0.5, 0.6):  # beyond, sites run empty
        keep = cheapest(sparsity, SIZES, example)
        skipped = sum((SIZES.width[site] - k) * SIZES.outputs[site] for site in SITES for k in keep[site])
        assert 0 <= round(sparsity * SIZES.linear_weights) - skipped < max(SIZES.outputs.values())


def test_a_site_that_matters_more_drops_less():
    entries = {place: torch.linspace(0, 1, SIZES.width[place[1]]).double() for place in PLACES}
    runs = []

    def divergence(keep):
        (place,) = [p for p in PLACES if keep[p[1]][p[0]] != SIZES.width[p[1]]]
        assert keep[place[1]][place[0]] == SIZES.width[place[1]] - round(PROBE * SIZES.width[place[1]])
        runs.append(place)
        return 100.0 if place == (1, "h3") else 1.0

    keep = allocate(0.5, SIZES, entries, divergence, SearchLog(None, {}))
    assert runs == PLACES
    assert keep["h3"][1] > keep["h3"][0]


def test_resumes_from_its_log_and_measures_nothing_twice(tmp_path):
    entries = {place: torch.linspace(0, 1, SIZES.width[place[1]]).double() for place in PLACES}
    options = {"names": ("layer", "site"), "measured": "kl_divergence"}
    values = iter([0.1 * n for n in range(1, 9)])
    first = allocate(0.5, SIZES, entries, lambda _: next(values), SearchLog(tmp_path / "log", {}, **options))
    lines = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").write_text("\n".join(lines[:5]) + '\n{"layer": 0.0, "si')
    rest = iter([0.1 * n for n in range(5, 9)])
    again = allocate(0.5, SIZES, entries, lambda _: next(rest), SearchLog(tmp_path / "log", {}, **options))
    assert again == first
    assert next(rest, None) is None


def test_sites_without_effect_or_entries_go_first():
    entries = {place: torch.zeros(SIZES.width[place[1]]).double() for place in PLACES}
    keep = allocate(0.3, SIZES, entries, lambda _: -1e-12, SearchLog(None, {}))  # rounding can dip below zero
    assert all(k <= SIZES.width[site] for site in SITES for k in keep[site])


@pytest.mark.parametrize("score", ["weights", "magnitude"])
def test_entries_are_squares_times_scores_in_order(make_model, quick_convert, token_ids, score):
    architecture = find_architecture("llama")
    model = quick_convert(make_model("llama", torch.float64), score=score)
    set_keep_counts(model, architecture, keep_counts(0.0, PerSite(), SiteSizes.of(model.config)))
    seen = {}
    for site, found in selectors(model, architecture).items():
        for layer, selector in enumerate(found):
            selector.register_forward_pre_hook(
                lambda s, i, p=(layer, site): seen.setdefault(p, (i[0], s.score)) and None
            )
    ids = token_ids(2, 9)
    entries = sorted_entries(model, architecture, lambda: model(ids))
    assert set(entries) == set(seen)
    for place, (x, weights) in seen.items():
        rows = (x.flatten(0, 1) * (1 if weights is None else weights)).square().sort(-1).values
        torch.testing.assert_close(entries[place], rows.mean(0), rtol=1e-4, atol=1e-9)


def test_conversion_keeps_the_budget_and_records_what_it_found(make_model, quick_convert, token_ids, tmp_path):
    options = {"search": "sensitivity", "sparsity": 0.4, "search_log": tmp_path / "log.jsonl"}
    model = quick_convert(make_model("qwen2"), **options)
    block, sizes = model.config.larosa, SiteSizes.of(model.config)
    assert (block["search"], block["alphas"]) == ("sensitivity", None)
    for site, found in selectors(model, find_architecture("qwen2")).items():
        assert [selector.k for selector in found] == block["keep"][site]
    skipped = sizes.skipped_weights({site: [sizes.width[site] - k for k in block["keep"][site]] for site in SITES})
    assert 0.4 - 0.01 < skipped / sizes.linear_weights <= 0.4
    assert len({tuple(counts) for counts in block["keep"].values()}) == 4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1 + 3 * 4
    # The log has no sparsity in it: another one needs no new measurement and gives other counts.
    before = (tmp_path / "log.jsonl").read_bytes()
    other = quick_convert(make_model("qwen2"), **{**options, "sparsity": 0.2})
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert other.config.larosa["keep"] != block["keep"]
    assert json.loads(before.splitlines()[1]).keys() == {"layer", "site", "kl_divergence"}


def test_at_zero_sparsity_everything_is_kept(make_model, quick_convert):
    model = quick_convert(make_model("llama"), search="sensitivity", sparsity=0.0)
    assert model.config.larosa["keep"] == {"h1": [32] * 3, "h2": [32] * 3, "h3": [32] * 3, "h4": [56] * 3}


def test_refuses_the_papers_budget(make_model, quick_convert):
    with pytest.raises(LarosaError, match="add --budget weights"):
        quick_convert(make_model("llama"), search="sensitivity", budget="paper")
