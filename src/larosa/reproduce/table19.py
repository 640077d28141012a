"""Table 19: what the residual adapters add to a forward pass."""

from __future__ import annotations

from typing import Any

from larosa.config import Rotation
from larosa.reproduce import paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.sparsity import SiteSizes
from larosa.sparsity.report import inspect_config

#: The paper counts a sequence of so many tokens.
_TOKENS = 2048


def tflops(config: Any, rotation: Rotation) -> float:
    """TFLOPs of 2048 tokens through a model that reads every weight, with the adapters of a rotation level."""
    adapters = SiteSizes.of(config).adapter_weights(rotation)
    return (inspect_config(config).flops_dense + 2 * adapters) * _TOKENS / 1e12


def run(context: Context) -> Results:
    """The model at hand and all of the paper's, from their shapes alone."""
    configs = [("this model", context.config), *((model.name, model.config) for model in paper.MODELS)]
    rows: list[list[Cell]] = []
    for name, config in configs:
        dense, ours = tflops(config, Rotation.NONE), tflops(config, Rotation.LAYER)
        one = 2 * config.hidden_size**2 * _TOKENS / 1e12
        theirs = paper.TABLE_19.get(name, (None, None))
        rows.append([name, dense, theirs[0], ours, ours / dense, ours + one, theirs[1]])
    columns = [
        Column("model"),
        Column("dense, TFLOPs", ".4g"),
        Column("dense, paper", ".2f"),
        Column("with L-1 adapters (ours)", ".4g"),
        Column("of dense", ".3f"),
        Column("with L adapters", ".4g"),
        Column("converted, paper", ".2f"),
    ]
    notes = [
        "A sequence of 2048 tokens, two operations per weight of the decoder and the head, plus attention. Decoding "
        "the same 2048 tokens costs the same, as the paper's second half of the table shows.",
        "After the last layer no adapter is needed: its rotation merges into the head. The paper's numbers are those "
        "of L adapters. Its 32.57 for Qwen2.5-72B lacks a digit (325.68 in its decode column).",
    ]
    return Results([Table("table19", "TFLOPs of 2048 tokens", columns, rows)], [], notes)


EXPERIMENT = Experiment(
    "table19",
    "FLOPs with residual adapters",
    "The adapters add 5 to 7% to the FLOPs of a dense forward pass.",
    run,
)
