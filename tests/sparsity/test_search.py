import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from larosa import LarosaError, PerSite
from larosa.config import Budget
from larosa.sparsity import SiteSizes, keep_counts
from larosa.sparsity.search import SearchLog, grid_search

SETTINGS = {"sparsity": 0.5, "budget": "paper"}


@pytest.fixture(scope="module")
def sizes(family_config):
    return SiteSizes.of(family_config("llama", hidden_size=64, intermediate_size=160))


def feasible(sparsity, budget):
    """Every grid point whose four site sparsities lie in [0, 1], in exact arithmetic, for the sizes above."""
    p = Fraction(sparsity).limit_denominator(1000)
    # Weights of h1 to h4: MHA counts 3 : 1 and 2 : M; with half as many key heads q, k, v are 2 x 64 x 64.
    weight = (3, 1, 2, Fraction(160, 64)) if budget is Budget.PAPER else (2, 1, 2, 1)
    points = set()
    for i in range(11):
        for j in range(11):
            a1, a3 = Fraction(70 + 5 * i, 100), Fraction(70 + 5 * j, 100)
            a2 = (weight[0] + weight[1] - weight[0] * a1) / weight[1]
            a4 = (weight[2] + weight[3] - weight[2] * a3) / weight[3]
            if all(0 <= a * p <= 1 for a in (a1, a2, a3, a4)):
                points.add((float(a1), float(a3)))
    return points


@pytest.mark.parametrize("budget", list(Budget))
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.7, 0.85, 0.9, 0.97])
def test_visits_each_feasible_point_once(sizes, sparsity, budget):
    asked = []
    log = SearchLog(None, SETTINGS)
    grid_search(sparsity, budget, sizes, lambda keep: asked.append(keep) or 1.0, log)
    assert set(log.points) == feasible(sparsity, budget)
    assert len(asked) == len(log.points)


@settings(max_examples=examples(30))
@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_picks_the_first_of_the_lowest(sizes, chance, levels):
    seen = []

    def perplexity(keep):
        seen.append((float(chance.randrange(levels)), keep))
        return seen[-1][0]

    alphas = grid_search(0.5, Budget.PAPER, sizes, perplexity, SearchLog(None, SETTINGS))
    lowest = min(value for value, _ in seen)
    first = next(keep for value, keep in seen if value == lowest)
    assert keep_counts(0.5, alphas, sizes) == first


def test_finds_a_known_minimum(sizes):
    # Entries kept at h1 and h3 stand for the coefficients; the bowl's bottom is a grid point.
    target = keep_counts(0.5, PerSite(h1=0.85, h3=1.10), sizes)

    def perplexity(keep):
        return (keep.h1[0] - target.h1[0]) ** 2 + (keep.h3[0] - target.h3[0]) ** 2

    alphas = grid_search(0.5, Budget.PAPER, sizes, perplexity, SearchLog(None, SETTINGS))
    assert (alphas.h1, alphas.h3) == (0.85, 1.10)
    assert alphas.h2 == pytest.approx(4 - 3 * 0.85)
    assert alphas.h4 == pytest.approx((2 + 2.5 - 2 * 1.10) / 2.5)


def test_infinite_perplexities_lose(sizes):
    values = iter([float("inf")] * 50 + [7.0] + [float("inf")] * 100)
    alphas = grid_search(0.5, Budget.PAPER, sizes, lambda keep: next(values), SearchLog(None, SETTINGS))
    assert (alphas.h1, alphas.h3) == (0.9, 1.0)  # the 51st of 11 x 11


def full_log(path, sizes):
    log = SearchLog(path, SETTINGS)
    alphas = grid_search(0.5, Budget.PAPER, sizes, lambda keep: float(keep.h1[0] * 7 % 11 + keep.h3[0] % 3), log)
    return alphas, path.read_bytes()


@pytest.mark.parametrize("cut", [1, 3, 20, -40])
def test_resumes_after_a_kill_in_the_middle_of_a_line(sizes, tmp_path, cut):
    path = tmp_path / "log.jsonl"
    alphas, whole = full_log(path, sizes)
    kept = whole.splitlines(keepends=True)[:31]  # the settings and 30 points
    path.write_bytes(b"".join(kept) + whole.splitlines(keepends=True)[31][:cut])
    asked = []

    def perplexity(keep):
        asked.append(keep)
        return float(keep.h1[0] * 7 % 11 + keep.h3[0] % 3)

    again = grid_search(0.5, Budget.PAPER, sizes, perplexity, SearchLog(path, SETTINGS))
    assert len(asked) == 121 - 30
    assert again == alphas
    assert path.read_bytes() == whole


def test_complete_last_line_without_its_newline_counts(sizes, tmp_path):
    path = tmp_path / "log.jsonl"
    _, whole = full_log(path, sizes)
    path.write_bytes(whole[:-1])
    assert len(SearchLog(path, SETTINGS).points) == 121
    assert path.read_bytes() == whole


def test_each_point_is_on_disk_at_once(sizes, tmp_path):
    path = tmp_path / "log.jsonl"
    lines = []

    def perplexity(keep):
        lines.append(len(path.read_text("utf-8").splitlines()))
        return 1.0

    grid_search(0.5, Budget.PAPER, sizes, perplexity, SearchLog(path, SETTINGS))
    assert lines == list(range(1, 122))


@pytest.mark.parametrize("value", [1.5, 1e300, float("inf"), 0.1 + 0.2])
def test_perplexities_come_back_exactly(tmp_path, value):
    path = tmp_path / "log.jsonl"
    SearchLog(path, SETTINGS).add((0.7, 1.2), value)
    assert SearchLog(path, SETTINGS).points == {(0.7, 1.2): value}


@pytest.mark.parametrize(
    ("other", "named"),
    [({"sparsity": 0.4, "budget": "paper"}, "sparsity"), ({"sparsity": 0.5}, "budget"), ({**SETTINGS, "x": 1}, "x")],
)
def test_refuses_a_log_of_other_settings(tmp_path, other, named):
    path = tmp_path / "log.jsonl"
    SearchLog(path, SETTINGS).add((0.7, 0.7), 5.0)
    before = path.read_bytes()
    with pytest.raises(LarosaError, match=rf"other settings \({named}\)"):
        SearchLog(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"[1, 2]\n",
        b"{broken}\n",
        b"\xff\xfe\x00binary",
        json.dumps(SETTINGS).encode() + b'\n{"alpha1": 0.7}\n',
        json.dumps(SETTINGS).encode() + b'\n{"alpha1": 0.7, "alpha3": 0.7, "perplexity": "low"}\n',
    ],
    ids=["empty", "text", "list", "not-json", "binary", "missing-key", "not-a-number"],
)
def test_refuses_what_is_no_log(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(LarosaError, match=r"log\.jsonl: not a search log"):
        SearchLog(path, SETTINGS)
    assert path.read_bytes() == content


@pytest.fixture
def counted(monkeypatch):
    """Counts the search's perplexity runs, which still happen."""
    from larosa.conversion import searches

    calls = []
    run = searches.evaluate_windows
    monkeypatch.setattr(searches, "evaluate_windows", lambda *args: calls.append(1) or run(*args))
    return calls


def test_conversion_with_search_resumes_to_the_same_model(make_model, quick_convert, token_ids, tmp_path, counted):
    options = {"search": "grid", "num_sequences": 1, "sequence_length": 16, "budget": "paper"}
    path = tmp_path / "log.jsonl"
    first = quick_convert(make_model("llama"), search_log=path, **options)
    whole, logits = path.read_bytes(), first(token_ids(2, 16)).logits
    points = [json.loads(line) for line in whole.splitlines()[1:]]
    assert len(counted) == len(points) == 121
    best = min(points, key=lambda point: point["perplexity"])
    alphas = PerSite(**first.config.larosa["alphas"])
    assert (alphas.h1, alphas.h3) == (best["alpha1"], best["alpha3"])
    assert len({point["perplexity"] for point in points}) > 100

    given = quick_convert(make_model("llama"), alphas=alphas, budget="paper", num_sequences=1, sequence_length=16)
    assert torch.equal(given(token_ids(2, 16)).logits, logits)
    assert given.config.larosa["keep"] == first.config.larosa["keep"]

    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:100]) + b'{"alpha1": 0.')
    second = quick_convert(make_model("llama"), search_log=path, **options)
    assert len(counted) == 121 + 22
    assert path.read_bytes() == whole
    assert second.config.larosa == first.config.larosa
    assert torch.equal(second(token_ids(2, 16)).logits, logits)


def test_search_log_of_another_model_or_text_is_refused(make_model, quick_convert, tmp_path):
    options = {"search": "grid", "num_sequences": 1, "sequence_length": 16, "rotation": "none", "sparsity": 0.9}
    path = tmp_path / "log.jsonl"
    quick_convert(make_model("llama"), search_log=path, **options)
    with pytest.raises(LarosaError, match=r"other settings \(model\)"):
        quick_convert(make_model("llama", seed=1), search_log=path, **options)
    with pytest.raises(LarosaError, match=r"other settings \(calibration, sequences\)"):
        quick_convert(make_model("llama"), search_log=path, **{**options, "seed": 1})
