"""Methods at equal bytes: the numbers against conversions made one by one."""

from __future__ import annotations

import numpy as np
import pytest

import larosa
from larosa.evaluation.perplexity import Protocol
from larosa.reproduce import EXPERIMENTS, equal_bytes
from larosa.reproduce import context as context_module
from larosa.reproduce.context import Context
from larosa.reproduce.equal_bytes import SPARSITIES, at_bytes

NAMES = ("best", "paper", "TEAL", "TopK")
BYTES, KL = "bytes per token, of dense", "KL to dense (nats/token)"


@pytest.fixture(scope="module")
def results(shared_context):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_module, "GRID", (0.9, 1.0))
        return EXPERIMENTS["equal-bytes"].run(shared_context)


@pytest.fixture(scope="module")
def rows(results):
    (table,) = results.tables
    return [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]


def test_every_method_at_every_sparsity(results, rows):
    points = [(row["method"], row["sparsity"]) for row in rows]
    assert points[0] == ("dense", 0.0)
    assert points[1:] == [(name, each) for name in NAMES for each in SPARSITIES]
    assert rows[0][BYTES] == 1
    (picture,) = results.pictures
    assert picture.png.startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "options"), [("best", {"recipe": "best"}), ("TopK", {"method": "topk"})])
@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_a_row_is_what_a_conversion_of_its_own_loses_and_reads(rows, dense, settings, name, options, sparsity):
    row = next(row for row in rows if (row["method"], row["sparsity"]) == (name, sparsity))
    (model, tokenizer), (reference, _) = (larosa.load(str(dense), device="cpu") for _ in range(2))
    sample = {"calibration": settings().calibration, "num_sequences": 4, "sequence_length": 16}
    larosa.convert(model, tokenizer, sparsity=sparsity, **options, **(sample if name == "best" else {}))
    expected = larosa.evaluate(
        model, tokenizer, settings().data, sequence_length=16, max_sequences=2, reference=reference
    )
    assert row[KL] == pytest.approx(expected.kl_divergence, rel=1e-4)
    assert row["± KL"] == pytest.approx(expected.comparison.kl_divergence.mean.stderr, rel=1e-4)
    costs = larosa.inspect(model)
    extra = (costs.adapter_bytes + costs.score_bytes) / costs.bytes_dense_total
    assert row[BYTES] == pytest.approx(1 - expected.actual_sparsity.mean + extra, rel=1e-9)


def test_adapters_and_scores_count(rows, shared_context):
    sizes = shared_context.sizes
    weights = sizes.linear_weights
    for row in rows[1:]:
        extra = 2 * 32 * 32 if row["method"] == "paper" else 0  # three layers, two adapters
        extra += sizes.score_entries if row["method"] == "best" else 0
        assert row[BYTES] == pytest.approx(1 - row["weights skipped, measured"] + extra / weights, abs=1e-9)


def test_the_baseline_at_equal_bytes(rows):
    baselines = [sorted((r[BYTES], r[KL]) for r in rows if r["method"] == name) for name in ("TEAL", "TopK")]
    inside = 0
    for row in rows[1:]:
        found = row["KL, of the better of TEAL and TopK at these bytes"]
        reached = [curve for curve in baselines if curve[0][0] <= row[BYTES] <= curve[-1][0]]
        if not reached:
            assert found is None
            continue
        inside += 1
        at = [np.exp(np.interp(row[BYTES], [x for x, _ in c], [np.log(y) for _, y in c])) for c in reached]
        assert found == pytest.approx(row[KL] / min(at))
    assert inside > 10


def test_no_interpolation_through_what_has_no_logarithm():
    assert at_bytes([(0.5, 0.2), (1.0, 0.0)], 0.7) is None
    assert at_bytes([(0.5, 0.2), (0.5, 0.2)], 0.5) == pytest.approx(0.2)
    assert at_bytes([], 0.5) is None


def test_the_other_protocol(dense, settings, tmp_path):
    context = Context(str(dense), settings(protocol=Protocol.CONTINUATION), tmp_path / "cache")
    found = context.evaluate(equal_bytes.TOPK, 0.5)
    (model, tokenizer), (reference, _) = (larosa.load(str(dense), device="cpu") for _ in range(2))
    larosa.convert(model, tokenizer, method="topk", sparsity=0.5)
    expected = larosa.evaluate(
        *(model, tokenizer, settings().data),
        **{"sequence_length": 16, "max_sequences": 2, "reference": reference, "protocol": "continuation"},
    )
    assert found["tokens"] == expected.tokens == 2 * 7
    assert found["kl"] == pytest.approx(expected.kl_divergence)
    assert context.evaluate_dense()["tokens"] == 2 * 7
    assert "the first 8 of each a dense prompt" in context.evaluated
