"""The demonstration: what rotation buys, on the bundled model and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from larosa.calibration.sources import SELF, calibration_sequences
from larosa.checkpoints.io import load
from larosa.config import Rotation, RotationObjective, Score, Search
from larosa.conversion import ConversionOptions, sparsify
from larosa.data.bundled import bundled_model
from larosa.data.text import BUNDLED
from larosa.evaluation.perplexity import Evaluation, RecordedLogits, evaluate_windows, evaluation_windows

SPARSITIES = (0.25, 0.40, 0.50, 0.60)

#: The paper's own choices where recipe `best` has others.
_PLAIN: dict[str, Any] = {
    "rotation_objective": RotationObjective.INPUTS,
    "value_rotation": False,
    "score": Score.MAGNITUDE,
    "search": Search.NONE,
}

#: Rows of the table, in order, by the options that make the difference.
METHODS: dict[str, dict[str, Any]] = {
    "Top-K, no rotation": {**_PLAIN, "rotation": Rotation.NONE},
    "Top-K, random rotation": {**_PLAIN, "rotation": Rotation.RANDOM},
    "LaRoSA": {**_PLAIN, "rotation": Rotation.LAYER},
    "Recipe best": {},
    "Recipe best, rotated": {"rotation": Rotation.LAYER},
}

_SAMPLE: dict[str, Any] = {"num_sequences": 64, "sequence_length": 128}
_MEASURED_LENGTH, _MEASURED_WINDOWS = 512, 4


@dataclass(frozen=True)
class DemoRow:
    """One method at one sparsity; KL divergence in nats per token, both it and agreement to dense."""

    method: str
    sparsity: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def run_demo(*, seed: int, device: str) -> list[DemoRow]:
    """Evaluate dense, Top-K without and with a random rotation, and LaRoSA without and with
    the parts of recipe `best`, at `SPARSITIES`.

    All methods are calibrated on the same sequences, sampled once from the model itself, and run at all
    sparsities.
    """
    folder = bundled_model()
    reference, tokenizer = load(folder, dtype="float32", device=device)
    windows = evaluation_windows(reference, tokenizer, BUNDLED, _MEASURED_LENGTH, _MEASURED_WINDOWS)
    dense = RecordedLogits(reference, windows)
    rows: list[DemoRow] = []

    def add(method: str, sparsity: float, result: Evaluation) -> None:
        assert result.kl_divergence is not None
        assert result.top1_agreement is not None
        row = DemoRow(method, sparsity, result.perplexity, result.kl_divergence, result.top1_agreement)
        rows.append(row)

    add("Dense", 0.0, evaluate_windows(reference, windows, dense))
    sequences = calibration_sequences(SELF, reference, tokenizer, **_SAMPLE, seed=seed)
    for method, parts in METHODS.items():
        model, _ = load(folder, dtype="float32", device=device)
        options = ConversionOptions(sparsity=SPARSITIES[0], **parts, calibration=SELF, **_SAMPLE, seed=seed)
        converted = sparsify(model, tokenizer, options.complete(), sequences=sequences)
        for sparsity in SPARSITIES:
            converted.set_sparsity(sparsity)
            add(method, sparsity, evaluate_windows(model, windows, dense))
    return rows


def plot_demo(rows: list[DemoRow], picture: Path) -> None:
    """Draw the KL divergence of each method over its sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, marker in zip(METHODS, "sXo*D", strict=True):
        curve = [row for row in rows if row.method == method]
        axes.plot(
            [100 * row.sparsity for row in curve],
            [row.kl_divergence for row in curve],
            marker=marker,
            label=method,
        )
    axes.set(
        title="Distance from the dense model, larosa-tiny on the bundled text",
        xlabel="weights skipped per token (%)",
        ylabel="KL divergence to dense (nats per token)",
        xticks=[100 * sparsity for sparsity in SPARSITIES],
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
    plt.close(figure)
