"""Table 9: weights of 4 bits under the selections."""

from __future__ import annotations

from dataclasses import replace

from larosa.config import Method
from larosa.formats import Quantizer, WeightFormat
from larosa.reproduce import paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import PAPER_BUDGET, QUALITY, Experiment, quality
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.variants import BEST, LAROSA, Variant

#: No sparsity is Top-K that keeps everything.
_ROWS = [(Variant("dense", Method.TOPK), 0.0)]
_ROWS += [
    (replace(variant, label=label), p) for label, variant in (("paper", LAROSA), ("best", BEST)) for p in (0.25, 0.5)
]

_QUANTIZERS = (None, Quantizer.RTN, Quantizer.GPTQ)


def run(context: Context) -> Results:
    """The dense model, the paper's method and recipe best, in full and with weights of 4 bits by each quantizer."""
    rows: list[list[Cell]] = []
    for variant, sparsity in _ROWS:
        plain = quality(context.evaluate(variant, sparsity)) if sparsity else [0.0, 1.0, _perplexity(context)]
        for quantizer in _QUANTIZERS:
            found, bits = plain, None
            if quantizer is not None:
                stored = replace(variant, weights=WeightFormat.INT4, quantizer=quantizer)
                measured = context.evaluate(stored, sparsity)
                found, bits = quality(measured), measured["weight_bits"]
            added = None if quantizer is None else _number(found[0]) - _number(plain[0])
            theirs = [] if context.paper is None else [_paper(context, variant.label, sparsity, quantizer)]
            rows.append([variant.label, sparsity, quantizer or "none", bits, *found, added, *theirs])
    columns = [Column("method"), Column("sparsity", ".0%"), Column("quantizer"), Column("bits of a weight", ".3g")]
    columns += [*QUALITY, Column("KL beyond the same without", "+.4f")]
    if context.paper:
        columns.append(Column("perplexity, paper", ".2f"))
    title = f"Weights of 4 bits, {context.evaluated}"
    return Results([Table("table9", title, columns, rows)], [], _notes(context))


def _perplexity(context: Context) -> float:
    return float(context.evaluate_dense()["perplexity"])


def _number(cell: Cell) -> float:
    assert isinstance(cell, int | float)
    return cell


def _paper(context: Context, label: str, sparsity: float, quantizer: Quantizer | None) -> float | None:
    if context.paper is None or label == "best":
        return None
    return paper.TABLE_9.get(context.paper.name, {}).get(sparsity, {}).get(quantizer)


def _notes(context: Context) -> list[str]:
    notes = [
        "The head is in full. A scale is shared by a group of outputs within one column of the merged weights, so that "
        "a skipped column skips its scales; the paper's quantizers, as we read it, share one among inputs.",
        "rtn searches each group's scale for the least squared error. That is also what AWQ and OmniQuant come down to "
        "here: AWQ's factors of inputs cancel where every input has scales of its own, and what is left of both is "
        "clipping. Neither has rows of its own.",
        "gptq passes the rounding of a column on to those behind it, by the second moment of the site's whole inputs: "
        "the same codes serve every sparsity.",
    ]
    return [*notes, PAPER_BUDGET] if context.paper else notes


EXPERIMENT = Experiment(
    "table9",
    "Weights of 4 bits: RTN and GPTQ under the paper's method and best",
    "What sparsity and quantization lose adds up: at 25% and 50% each quantizer costs about what it costs alone.",
    run,
)
