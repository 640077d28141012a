"""The frontier's numbers against conversions made one by one, and llama.cpp's rows beside them."""

from __future__ import annotations

import json

import pytest

import larosa
from larosa.errors import LarosaError
from larosa.reproduce import EXPERIMENTS
from larosa.reproduce.context import Context, token_digest
from larosa.reproduce.frontier import BOUNDS, SPARSITIES, SPARSITIES_OF_PLANES, read_points

WEIGHTS = ("full", "int8", "int4+4", "int6", "int5", "int4", "3 bits")
KL, TOKEN = "KL to dense (nats/token)", "MB, per token"
THEIRS = {
    "type": "Q4_0",
    "weight_bits": 4.5,
    "decoder_bytes": 9000,
    "head_bytes": 1000,
    "file_bytes": 12000,
    "kl": 0.15,
    "kl_stderr": 0.01,
    "top1": 0.8,
    "perplexity": 50.0,
}


def beside(context, path, **changes):
    """A file like that of benchmarks/llamacpp/quality.py, of the context's model and windows."""
    content = {"fingerprint": context.fingerprint, "windows": token_digest(context.windows), "rows": [THEIRS]}
    path.write_text(json.dumps({**content, **changes}), "utf-8")
    return path


@pytest.fixture(scope="module")
def results(shared_context, dense, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    path = beside(shared_context, folder / "llamacpp.json")
    return EXPERIMENTS["frontier"].run(Context(str(dense), settings(llama_cpp=path), folder / "cache"))


@pytest.fixture(scope="module")
def rows(results):
    table = results.tables[0]
    return [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]


def test_every_format_at_every_sparsity(results, rows):
    points = [(row["weights"], row["sparsity"]) for row in rows]
    tried = {"int4+4": SPARSITIES_OF_PLANES}
    ours = [(weights, sparsity) for weights in WEIGHTS for sparsity in tried.get(weights, SPARSITIES)]
    assert points == [("dense", None), *ours, ("llama.cpp Q4_0", None)]
    assert rows[-1][TOKEN] == 0.01
    (picture,) = results.pictures
    assert picture.png.startswith(b"\x89PNG")


@pytest.mark.parametrize(("weights", "sparsity"), [("full", 0.25), ("int8", 0.5), ("int4+4", 0.6), ("int4", 0.0)])
def test_a_row_is_what_a_conversion_of_its_own_loses_and_reads(rows, dense, settings, weights, sparsity):
    row = next(row for row in rows if (row["weights"], row["sparsity"]) == (weights, sparsity))
    (model, tokenizer), (reference, _) = (larosa.load(str(dense), device="cpu") for _ in range(2))
    sample = {"calibration": settings().calibration, "num_sequences": 4, "sequence_length": 16}
    larosa.convert(model, tokenizer, sparsity=sparsity, weights=weights, **sample)
    expected = larosa.evaluate(
        model, tokenizer, settings().data, sequence_length=16, max_sequences=2, reference=reference
    )
    assert row[KL] == pytest.approx(expected.kl_divergence, rel=1e-4, abs=1e-9)
    costs = larosa.inspect(model)
    read = (1 - expected.actual_sparsity.mean) * costs.bytes_dense_total + costs.adapter_bytes + costs.score_bytes
    assert 1e6 * row["MB, decoder"] == pytest.approx(read, rel=1e-3)
    skipped = expected.zeros["head"].mean if weights == "int4+4" else 0
    assert 1e6 * row["MB, head"] == pytest.approx((1 - skipped) * costs.head_bytes, rel=1e-3)
    assert 1e6 * row["MB, file"] == costs.parameter_bytes
    assert row["bits of a weight"] == costs.weight_bits
    assert row[TOKEN] == pytest.approx(row["MB, decoder"] + row["MB, head"])


def test_bits_that_no_checkpoint_has(rows, shared_context):
    """What 3 bits read and lose beside 4, which have the same groups."""
    of = {weights: [row for row in rows if row["weights"] == weights] for weights in WEIGHTS}
    for three, four in zip(of["3 bits"], of["int4"], strict=True):
        assert three["bits of a weight"] == pytest.approx(four["bits of a weight"] - 1, abs=0.02)
        assert three["MB, decoder"] < four["MB, decoder"]
        assert three["MB, head"] == four["MB, head"]
        saved = (four["bits of a weight"] - three["bits of a weight"]) / 8 * shared_context.sizes.linear_weights
        assert 1e6 * (four["MB, file"] - three["MB, file"]) == pytest.approx(saved)
    losses = [of[weights][0][KL] for weights in WEIGHTS if weights != "int4+4"]  # which has no row at 0%
    assert losses == sorted(losses)


def test_what_reads_least_within_a_bound(results, rows):
    for bound, name, read, theirs, their_read in results.tables[1].rows:
        assert bound in BOUNDS
        within = [row for row in rows[1:-1] if row[KL] <= bound]
        best = min(within, key=lambda row: row[TOKEN])
        assert (name, read) == (f"{best['weights']}, {best['sparsity']:.0%}", best[TOKEN])
        assert (theirs, their_read) == (("llama.cpp Q4_0", 0.01) if bound >= 0.15 else (None, None))


def test_rows_of_something_else_are_refused(shared_context, tmp_path):
    path = tmp_path / "llamacpp.json"
    with pytest.raises(LarosaError, match="of another model"):
        read_points(beside(shared_context, path, fingerprint="0"), shared_context)
    with pytest.raises(LarosaError, match="of other windows"):
        read_points(beside(shared_context, path, windows="0"), shared_context)
    for rows in ([{"type": "Q4_0"}], None):
        with pytest.raises(LarosaError, match="not what"):
            read_points(beside(shared_context, path, rows=rows), shared_context)
    path.write_text("{", "utf-8")
    with pytest.raises(LarosaError, match="not what"):
        read_points(path, shared_context)
