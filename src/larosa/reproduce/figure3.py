"""Figure 3: calibrated thresholds against what tokens need, and the sparsity that results."""

from __future__ import annotations

from typing import Any

import torch

from larosa.evaluation.zeros import ZeroCounter, sparse_prompts
from larosa.reproduce import figures
from larosa.reproduce.activations import look, sample
from larosa.reproduce.calibration_sets import name, samples
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.settings import MAIN_SPARSITY, SPARSITIES
from larosa.reproduce.thresholds import calibrated_thresholds
from larosa.reproduce.variants import TEAL, TOPK, Variant
from larosa.sparsity import keeps_of
from larosa.utils.progress import track

#: What panel (b) shows, as the paper does.
_SHOWN = (0.40, 0.50)


def run(context: Context) -> Results:
    """Thresholds by layer, thresholds that each token would need, and actual sparsity by sequence."""
    calibrated = calibrated_thresholds(context, SPARSITIES)
    needed = _needed(context)
    sequences = {variant.label: _sequences(context, variant) for variant in (TEAL, TOPK)}
    layer = _layer(context)
    tables = [
        Table(
            "figure3-thresholds",
            "Calibrated thresholds by layer",
            [Column("layer", "d"), *(Column(f"{s} at {p:.0%}", ".4f") for s in ("h1", "h3") for p in SPARSITIES)],
            [
                [index + 1, *(value for site in ("h1", "h3") for value in calibrated[site][index])]
                for index in range(context.sizes.layers)
            ],
        ),
        _needed_table(layer, calibrated["h1"][layer], needed),
        _sequence_table(sequences),
    ]
    notes = [
        "Actual sparsity is the measured share of the decoder's weights that a token skips, at a nominal 50%.",
        "Panel (d) of the paper's figure, TEAL's decoding speed, is part of figure4.",
    ]
    pictures = [
        _draw_layers(calibrated),
        _draw_tokens(layer, calibrated["h1"][layer], needed),
        _draw_sequences(sequences),
    ]
    return Results(tables, pictures, notes)


def _layer(context: Context) -> int:
    """The layer of panel (b): the paper's 24th of 32, or as far in."""
    return max(0, context.sizes.layers * 24 // 32 - 1)


def _needed(context: Context) -> dict[str, list[float]]:
    """The threshold that each token of the sample would need at h1 for exactly the target sparsity."""
    shown = _layer(context)

    def measure() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}

        def see(layer: int, site: str, x: torch.Tensor) -> None:
            if (layer, site) != (shown, "h1"):
                return
            ordered = x.abs().sort(-1).values
            for sparsity in _SHOWN:
                drops = x.shape[-1] - keeps_of(x.shape[-1], sparsity)
                found[str(sparsity)] = ordered[:, drops - 1].float().tolist()

        look(context, context.dense(), sample(context), see)
        return found

    key = {"evaluation": context.evaluation_key, "layer": shown, "sparsities": list(_SHOWN)}
    return context.measure("needed", key, measure)


def _sequences(context: Context, variant: Variant) -> dict[str, Any]:
    """Mean actual sparsity of each sequence from the evaluated text and the calibration sets, and its spread."""
    sources: dict[str, tuple[str, int] | None] = {f"{name(context.settings.data)} (evaluated)": None}
    sources |= {label: pair for label, pair in samples(context).items() if pair[1] == context.settings.seed}

    def measure() -> dict[str, Any]:
        # Sequences first: text that the model generates comes from the dense one.
        windows = {
            label: context.windows if pair is None else context.calibration(*pair) for label, pair in sources.items()
        }
        windows = {label: rows[: context.settings.num_sequences] for label, rows in windows.items()}
        model = context.sparsified(variant, MAIN_SPARSITY)
        found: dict[str, Any] = {}
        tokens = []
        with torch.inference_mode(), sparse_prompts(model):
            for label, rows in windows.items():
                means = []
                for row in track(rows, f"{variant.label} on {label}"):
                    with ZeroCounter(model) as zeros:
                        model(row[None].to(context.device), use_cache=False)
                    skipped = zeros.skipped()
                    means.append(float(skipped.mean()))
                    tokens.append(skipped)
                found[label] = means
        every = torch.cat(tokens)
        quantiles = torch.quantile(every, torch.tensor([0.05, 0.95], dtype=every.dtype))
        first = torch.stack([skipped[:4].mean() for skipped in tokens]).mean()
        return {
            "sequences": found,
            "tokens": {
                "mean": float(every.mean()),
                "std": float(every.std(correction=0)),
                "low": float(quantiles[0]),
                "high": float(quantiles[1]),
                "first": float(first),
            },
        }

    keys = [[label, pair and [context.calibration_key(*pair)]] for label, pair in sources.items()]
    key = {
        **context.variant_key(variant, MAIN_SPARSITY, context.alphas(variant)),
        "evaluation": context.evaluation_key,
        "sources": keys,
    }
    return context.measure("sequences", key, measure)


def _needed_table(layer: int, calibrated: list[float], needed: dict[str, list[float]]) -> Table:
    rows: list[list[Cell]] = []
    for sparsity in _SHOWN:
        fixed = calibrated[SPARSITIES.index(sparsity)]
        values = torch.tensor(needed[str(sparsity)], dtype=torch.float64)
        low, middle, high = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        rows.append([sparsity, fixed, low, middle, high, float((values < fixed).double().mean())])
    columns = [
        Column("sparsity", ".0%"),
        Column("calibrated", ".4f"),
        *(Column(f"needed, {part}", ".4f") for part in ("5% of tokens below", "median", "95% below")),
        Column("tokens that need less", ".1%"),
    ]
    return Table("figure3-tokens", f"Thresholds at h1 of layer {layer + 1}: calibrated, and needed", columns, rows)


def _sequence_table(sequences: dict[str, dict[str, Any]]) -> Table:
    rows: list[list[Cell]] = []
    for label, found in sequences.items():
        tokens = found["tokens"]
        means = [mean for source in found["sequences"].values() for mean in source]
        rows.append([label, *(tokens[key] for key in ("mean", "std", "low", "high", "first")), min(means), max(means)])
    columns = [
        Column("method"),
        *(Column(text, ".2%") for text in ("mean", "deviation over tokens", "5% of tokens below", "95% below")),
        *(Column(text, ".2%") for text in ("first 4 tokens", "lowest sequence", "highest sequence")),
    ]
    return Table("figure3-sparsity", "Actual sparsity at a nominal 50%", columns, rows)


def _draw_layers(calibrated: dict[str, list[list[float]]]) -> Picture:
    figure, axes = figures.subplots(1, 2, size=(9, 3.6))
    for place, (site, block) in zip(axes, (("h1", "attention"), ("h3", "MLP")), strict=True):
        for (index, sparsity), colour, marker in figures.styled(enumerate(SPARSITIES)):
            values = [layer[index] for layer in calibrated[site]]
            style = {"color": colour, "marker": marker, "markersize": 4}
            place.plot(range(1, len(values) + 1), values, label=f"{sparsity:.0%}", **style)
        place.set(title=f"Input of {block} ({site})", xlabel="layer", ylim=(0, None))
        place.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("calibrated threshold (magnitude)")
    figures.add_legend(figure, axes[0], title="sparsity")
    caption = "(a) Thresholds from calibration, by layer and sparsity."
    return Picture("figure3a", caption, figures.to_png(figure))


def _draw_tokens(layer: int, calibrated: list[float], needed: dict[str, list[float]]) -> Picture:
    figure, axes = figures.subplots(size=(9, 3.8))
    for sparsity, colour, marker in figures.styled(_SHOWN):
        values = needed[str(sparsity)]
        axes.scatter(
            *(range(len(values)), values),
            **{"s": 7, "color": colour, "marker": marker, "alpha": 0.5, "linewidths": 0},
            label=f"needed for {sparsity:.0%}",
        )
        fixed = calibrated[SPARSITIES.index(sparsity)]
        axes.axhline(fixed, color=colour, linestyle="--", linewidth=2, label=f"calibrated for {sparsity:.0%}")
    axes.set(xlabel="token (windows one after the other)", ylabel="threshold (magnitude)", ylim=(0, None))
    axes.margins(x=0.01)
    axes.legend(ncols=2, loc="lower right", frameon=True, framealpha=0.9)
    caption = (
        f"(b) Thresholds that tokens need for an exact sparsity at h1 of layer {layer + 1}, and the calibrated ones."
    )
    return Picture("figure3b", caption, figures.to_png(figure))


def _draw_sequences(sequences: dict[str, dict[str, Any]]) -> Picture:
    figure, axes = figures.subplots(1, len(sequences), size=(9, 3.8), sharey=True)
    for place, (label, found) in zip(axes, sequences.items(), strict=True):
        rows = [(mean, source) for source, means in found["sequences"].items() for mean in means]
        rows.sort()
        for source, colour, marker in figures.styled(found["sequences"]):
            points = [(rank + 1, 100 * mean) for rank, (mean, origin) in enumerate(rows) if origin == source]
            style = {"color": colour, "marker": marker, "s": 22}
            place.scatter(*zip(*points, strict=True), label=source, **style)
        place.axhline(100 * MAIN_SPARSITY, color="black", linestyle="--", linewidth=1)
        place.set(title=label, xlabel="sequence, by its sparsity")
    axes[0].set_ylabel("weights skipped (%)")
    axes[-1].legend(fontsize=8)
    caption = "(c) Mean actual sparsity of each sequence at a nominal 50% (dashed), by where the sequence is from."
    return Picture("figure3c", caption, figures.to_png(figure))


EXPERIMENT = Experiment(
    "figure3",
    "Calibrated thresholds against actual ones",
    "Calibrated thresholds fit few tokens, least of all the first ones, so that actual sparsity fluctuates.",
    run,
)
