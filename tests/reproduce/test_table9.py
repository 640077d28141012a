"""Table 9's rows against conversions made one by one."""

from __future__ import annotations

import pytest

import larosa
from larosa.reproduce import EXPERIMENTS, paper, table9
from larosa.reproduce import context as context_module

KL, ADDED = "KL to dense (nats/token)", "KL beyond the same without"


@pytest.fixture(scope="module")
def rows(shared_context):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_module, "GRID", (0.9, 1.0))
        (table,) = EXPERIMENTS["table9"].run(shared_context).tables
    found = [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]
    return {(row["method"], row["sparsity"], row["quantizer"]): row for row in found}


def test_every_row_in_full_and_in_4_bits(rows):
    points = [("dense", 0.0), *((name, p) for name in ("paper", "best") for p in (0.25, 0.5))]
    assert list(rows) == [(*point, quantizer) for point in points for quantizer in ("none", "rtn", "gptq")]
    assert rows["dense", 0.0, "none"][KL] == 0
    for key, row in rows.items():
        plain = rows[(*key[:2], "none")]
        if key[2] != "none":
            assert row[ADDED] == pytest.approx(row[KL] - plain[KL])
            assert 4 < row["bits of a weight"] < 5
    assert rows["dense", 0.0, "rtn"][KL] > 0


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("method", "sparsity", "options"),
    [("dense", 0.0, {"method": "topk"}), ("best", 0.5, {}), ("best", 0.25, {})],
)
def test_a_row_is_what_a_conversion_of_its_own_loses(rows, dense, settings, method, sparsity, options, quantizer):
    (model, tokenizer), (reference, _) = (larosa.load(str(dense), device="cpu") for _ in range(2))
    larosa.convert(
        *(model, tokenizer),
        **{"sparsity": sparsity, "weights": "int4", "quantizer": quantizer, "head": "full", **options},
        **{"calibration": settings().calibration, "num_sequences": 4, "sequence_length": 16},
    )
    expected = larosa.evaluate(
        model, tokenizer, settings().data, sequence_length=16, max_sequences=2, reference=reference
    )
    assert rows[method, sparsity, quantizer][KL] == pytest.approx(expected.kl_divergence, rel=1e-4)


def test_the_papers_numbers(shared_context, monkeypatch):
    monkeypatch.setattr(shared_context, "paper", next(each for each in paper.MODELS if each.name == "LLaMA2-7B"))
    assert table9._paper(shared_context, "paper", 0.25, "gptq") == 5.74
    assert table9._paper(shared_context, "dense", 0.0, None) == 5.47
    assert table9._paper(shared_context, "best", 0.25, "gptq") is None
