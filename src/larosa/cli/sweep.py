"""What `larosa convert --sweep` shows: a model's loss over its sparsity, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from larosa.cli.options import console
from larosa.conversion.checkpoint import SweepPoint
from larosa.evaluation.verdict import BAR, verdict

#: The sparsities that are looked at where the user names none.
SWEEP = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)

SWEEP_PICTURE = Path("sweep.png")


def print_sweep(model: str, points: Sequence[SweepPoint]) -> None:
    """One row a sparsity, and what the highest that stays below the bar means."""
    table = Table(title=f"{model} on the bundled text, {points[0].evaluation.tokens:,} tokens", title_justify="left")
    for column in ("sparsity", "KL to dense", "top-1", "perplexity", "MB per token, with head", "of dense"):
        table.add_column(column, justify="right")
    for point in points:
        found = point.evaluation
        table.add_row(
            f"{point.sparsity:.0%}",
            f"{found.kl_divergence:.4f}",
            f"{found.top1_agreement:.1%}",
            f"{found.perplexity:.2f}",
            f"{point.bytes_per_token / 1e6:.1f}",
            f"{point.bytes_per_token / point.bytes_dense:.0%}",
        )
    console.print(table)
    below = [point for point in points if (point.evaluation.kl_divergence or 0.0) <= BAR]
    if not below:
        console.print(f"At none of these the divergence is below {BAR}.")
        return
    best = max(below, key=lambda point: point.sparsity)
    console.print(
        f"{best.sparsity:.0%} is the highest of these whose divergence is below {BAR}. "
        f"{verdict(best.evaluation.kl_divergence or 0.0)}"
    )


def plot_sweep(model: str, points: Sequence[SweepPoint], picture: Path) -> None:
    """Draw divergence and agreement over sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    percent = [100 * point.sparsity for point in points]
    left.plot(percent, [point.evaluation.kl_divergence for point in points], marker="o")
    left.axhline(BAR, color="tab:red", linestyle="--", label=f"{BAR}: beyond it text suffers")
    left.set(ylabel="KL divergence to dense (nats per token)", ylim=(0, None))
    left.legend()
    right.plot(percent, [100 * (point.evaluation.top1_agreement or 0.0) for point in points], marker="o")
    right.set(ylabel="same likeliest next token as dense (%)")
    for axes in (left, right):
        axes.set(xlabel="weights skipped per token (%)")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{model} on the bundled text")
    figure.savefig(picture, dpi=150)
    plt.close(figure)
