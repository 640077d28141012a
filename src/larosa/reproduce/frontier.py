"""The frontier: divergence over the bytes that a token reads, by bits and by sparsity. Not in the paper."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from larosa.errors import LarosaError
from larosa.formats import SCALE_DTYPE, Int8, Quantizer, WeightFormat
from larosa.reproduce import figures
from larosa.reproduce.context import Context, token_digest
from larosa.reproduce.experiment import QUALITY, Experiment, quality
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.variants import BEST, Variant

SPARSITIES = (0.0, 0.25, 0.40, 0.50)
#: Of weights in planes, half of which are as many bits as one plane.
SPARSITIES_OF_PLANES = (0.40, 0.50, 0.55, 0.60, 0.65, 0.70)


class ThreeBits(Int8):
    """Whole numbers of 3 bits, which no checkpoint has: held a byte each, and counted as if eight took three."""

    name = "3 bits"
    bits = 3
    lowest, highest = -4, 3
    targets = tuple(end * share / 100 for end in (lowest, highest) for share in range(85, 121, 3))
    usual_group = 32

    def column_bytes(self, outputs: int) -> int:
        """Bytes of a column of so many outputs, codes and scales."""
        return -(-3 * outputs // 8) + self.groups(outputs) * SCALE_DTYPE.itemsize


def _stored(weights: WeightFormat) -> Variant:
    if weights.planes > 1:
        return replace(BEST, label=weights, weights=weights, quantizer=Quantizer.RTN, head=weights)
    return replace(BEST, label=weights, weights=weights, quantizer=Quantizer.GPTQ, head=WeightFormat.INT8)


VARIANTS = (
    BEST,
    *map(_stored, (weights for weights in WeightFormat if weights is not WeightFormat.FULL)),
    replace(BEST, label=ThreeBits.name, unstored=ThreeBits(ThreeBits.usual_group), head=WeightFormat.INT8),
)
_FULL, LLAMA_CPP = "full", "llama.cpp"
#: How the names of its rows end that had one.
_IMPORTANCE = ", importance matrix"

#: Divergences for which the second table says what reads least.
BOUNDS = (0.01, 0.03, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Point:
    """A model that was measured; sparsity is None where that is no notion of what made it."""

    weights: str
    sparsity: float | None
    found: dict[str, Any]

    @property
    def read(self) -> float:
        """Bytes a token reads of the decoder and of the head."""
        return float(self.found["decoder_bytes"] + self.found["head_bytes"])

    @property
    def name(self) -> str:
        """What it is called in a cell."""
        return self.weights if self.sparsity is None else f"{self.weights}, {self.sparsity:.0%}"

    @property
    def cells(self) -> list[Cell]:
        """Its row."""
        found, (kl, *others) = self.found, quality(self.found)
        sizes = (found["decoder_bytes"], found["head_bytes"], self.read, found["file_bytes"])
        measured = [kl, found["kl_stderr"], *others]
        return [self.weights, self.sparsity, found["weight_bits"], *(size / 1e6 for size in sizes), *measured]


def run(context: Context) -> Results:
    """Recipe best in each format at each sparsity, and llama.cpp's quantisations of the same model."""
    ours = [
        Point(variant.label if variant.stored else _FULL, sparsity, context.evaluate(variant, sparsity))
        for variant in VARIANTS
        for sparsity in (SPARSITIES if variant.weights.planes == 1 else SPARSITIES_OF_PLANES)
    ]
    theirs = [] if context.settings.llama_cpp is None else read_points(context.settings.llama_cpp, context)
    dense = context.evaluate_dense()
    points = [Point("dense", None, {**dense, "kl": 0.0, "kl_stderr": None, "top1": 1.0}), *ours, *theirs]
    columns = [
        Column("weights"),
        Column("sparsity", ".0%"),
        Column("bits of a weight", ".3g"),
        *(Column(f"MB, {what}", ".1f") for what in ("decoder", "head", "per token", "file")),
        QUALITY[0],
        Column("± KL", ".4f"),
        *QUALITY[1:],
    ]
    title = f"Divergence over bytes per token, {context.evaluated}"
    tables = [
        Table("frontier", title, columns, [point.cells for point in points]),
        Table("within", "What reads least within a divergence", *_within(ours, theirs)),
    ]
    notes = [
        "A token reads weights, scales, adapters and score vectors of the decoder and the head, less the columns that "
        "the evaluated tokens did skip; not keys, values and norms. A file has the embedding too, "
        "which llama.cpp keeps as one with a tied head, by few bits.",
        "full is the checkpoint's own number format; few bits are fitted by GPTQ with the head in 8, which is read "
        "whole; int4+4 is rounded plane by plane, the head too, and its sparsity is of the decoder's planes. No "
        "checkpoint has 3 bits: those rows are of weights rounded so, their bytes what they would take. "
        "All are by recipe best, converted once; ± is a standard error over tokens taken as independent.",
    ]
    if theirs:
        notes.append("llama.cpp's rows are by its own logits, so that what it rounds of activations counts.")
    return Results(tables, [_draw(ours, theirs)], notes)


def read_points(path: Path, context: Context) -> list[Point]:
    """The rows of a file of benchmarks/llamacpp/quality.py.

    Raises:
        LarosaError: it is no such file, or of another model or other windows.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        model, windows, rows = content["fingerprint"], content["windows"], content["rows"]
        points = [Point(f"{LLAMA_CPP} {row['type']}", None, row) for row in rows]
        for point in points:
            _ = point.cells
    except (OSError, ValueError, KeyError, TypeError):
        raise LarosaError(f"{path}: not what benchmarks/llamacpp/quality.py writes (--llama-cpp)") from None
    if model != context.fingerprint:
        raise LarosaError(f"{path}: of another model than {context.path}; measure this one (--llama-cpp)")
    if windows != token_digest(context.windows):
        raise LarosaError(
            f"{path}: of other windows; give benchmarks/llamacpp/quality.py the same --data, --sequence-length and "
            "--max-sequences (--llama-cpp)"
        )
    return points


def _within(ours: list[Point], theirs: list[Point]) -> tuple[list[Column], list[list[Cell]]]:
    """Columns and rows: for each bound the point that reads least, of ours and of theirs."""
    columns = [Column("KL, at most", ".2f")]
    rows: list[list[Cell]] = [[bound] for bound in BOUNDS]
    for points, who in ((ours, "larosa"), (theirs, LLAMA_CPP)):
        if not points:
            continue
        columns += [Column(who), Column(f"MB per token, {who}", ".1f")]
        for row, bound in zip(rows, BOUNDS, strict=True):
            least = min(
                (each for each in points if each.found["kl"] <= bound), key=lambda each: each.read, default=None
            )
            row += [None, None] if least is None else [least.name, least.read / 1e6]
    return columns, rows


def _draw(ours: list[Point], theirs: list[Point]) -> Picture:
    figure, axes = figures.subplots(size=(9.0, 4.6))
    labels = list(dict.fromkeys(point.weights for point in ours))
    for label, colour, marker in figures.styled(labels):
        drawn = _visible(point for point in ours if point.weights == label)
        x, y = ([point.read / 1e6 for point in drawn], [point.found["kl"] for point in drawn])
        axes.plot(x, y, marker=marker, color=colour, label=label)
        for point in drawn:
            _annotate(axes, point, f"{point.sparsity:.0%}", colour)
    helped = [point for point in theirs if point.weights.endswith(_IMPORTANCE)]
    plain = [point for point in theirs if point not in helped]
    for points, label, filling in ((plain, LLAMA_CPP, "black"), (helped, LLAMA_CPP + _IMPORTANCE, "white")):
        if drawn := _visible(points):
            x, y = ([point.read / 1e6 for point in drawn], [point.found["kl"] for point in drawn])
            axes.plot(x, y, "k*", markerfacecolor=filling, label=label, linestyle="none")
    for point in _visible(plain):
        _annotate(axes, point, point.weights.removeprefix(f"{LLAMA_CPP} "), "black")
    axes.set(
        xlabel="MB that a token reads of decoder and head",
        ylabel="KL divergence to dense (nats per token)",
        yscale="log",
    )
    figures.add_legend(figure, axes)
    caption = (
        "Distance from the dense model over what a token reads, by bits of a weight and by sparsity; lower and further "
        "left is better."
    )
    return Picture("frontier", caption, figures.to_png(figure))


def _visible(points: Iterable[Point]) -> list[Point]:
    """Those that have a place on a logarithmic axis: what is exact but for the last bit would stretch it."""
    return [point for point in points if point.found["kl"] > 1e-4]


def _annotate(axes: Any, point: Point, text: str, colour: str) -> None:
    place = (point.read / 1e6, point.found["kl"])
    axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)


EXPERIMENT = Experiment(
    "frontier",
    "Divergence over bytes per token, with weights of 16 to 3 bits",
    "nothing of the kind: it has weights of 4 bits at equal sparsity, in Table 9.",
    run,
)
