#!/usr/bin/env python3
"""Times a GPU's steps of several tokens beside steps of one, and says whether each row gives the bits it gives alone.

    benchmarks/rows.py --shape llama-3-8b --dtype bfloat16 --rows 1,2,4,8

Rows are of one text, as where drafts are checked, or of a text each, as a server has them. Models have random weights:
dense, and converted by thresholds, which is timed with everything read too, as lossless mode's dense pass has it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import product

import torch

from larosa.benchmarks.shapes import random_model, random_sparse_model, set_sparsity, shape_config
from larosa.config import Selection
from larosa.decoding import Engine
from larosa.decoding.cuda_graph import StepGraphs
from larosa.decoding.weights import DecoderWeights

DEVICE = torch.device("cuda")


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rows", default="1,2,4,8", help="tokens of a step, separated by commas, up to 8")
    parser.add_argument("--position", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30, help="to time of each number of rows")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Print what steps of each model take, by their rows."""
    given = options()
    config = shape_config(given.shape, layers=given.layers)
    config.dtype = dtype = getattr(torch, given.dtype)
    numbers = [int(rows) for rows in given.rows.split(",")]
    for name, weights in models(config, dtype, given.sparsity):
        engine = Engine(weights, given.position + max(numbers) + 1, texts=max(numbers))
        prompt = torch.ones(1, given.position, dtype=torch.int64)
        for text in range(max(numbers)):
            engine.extend(prompt, 0, text)
        graphs, first = StepGraphs(engine), None
        for rows, together in product(numbers, (True, False)):
            if rows == 1 and not together:
                continue
            same = check(graphs, rows, together, given.position)
            milliseconds = time(graphs, rows, given.steps)
            first = milliseconds / rows if first is None else first
            of = "of one text" if together else "of a text each"
            print(
                f"{name}: {rows} rows {of} {milliseconds:.3f} ms, {milliseconds / rows:.3f} a row, "
                f"{milliseconds / first:.2f} of one alone; {'the same bits' if same else 'OTHER BITS'}",
                flush=True,
            )


def models(config: object, dtype: torch.dtype, sparsity: float) -> Iterator[tuple[str, DecoderWeights]]:
    """Weights to step with, one model in memory at a time."""
    yield "dense", DecoderWeights(random_model(config, dtype, DEVICE))
    model = random_sparse_model(config, dtype, DEVICE, selection=Selection.THRESHOLD)
    set_sparsity(model, sparsity)
    weights = DecoderWeights(model)
    yield f"thresholds at {sparsity:.0%}", weights
    yield "the same read whole", weights.whole()


def check(graphs: StepGraphs, rows: int, together: bool, position: int) -> bool:
    """Whether rows give what each gives alone; leaves the rows to be run again."""
    tokens = torch.arange(2, rows + 2)
    positions = torch.arange(rows) + position if together else torch.full((rows,), position)
    texts = torch.zeros(rows, dtype=torch.int64) if together else torch.arange(rows)
    alone = []
    for row in range(rows):
        for to, given in ((graphs.tokens, tokens), (graphs.positions, positions), (graphs.texts, texts)):
            to[0] = given[row]
        alone.append(graphs.step(1)[0].clone())
    for to, given in ((graphs.tokens, tokens), (graphs.positions, positions), (graphs.texts, texts)):
        to[:rows] = given.to(DEVICE)
    return torch.equal(graphs.step(rows), torch.stack(alone))


def time(graphs: StepGraphs, rows: int, steps: int) -> float:
    """Milliseconds of a step, the median."""
    measured = []
    for _ in range(steps + 1):  # the first is not counted
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs.step(rows)
        end.record()
        end.synchronize()
        measured.append(start.elapsed_time(end))
    return statistics.median(measured[1:])


if __name__ == "__main__":
    main()
