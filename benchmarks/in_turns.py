#!/usr/bin/env python3
"""Times a token of the decode engine in several checkouts, in turns on one machine: what a change does, nothing else.

    benchmarks/in_turns.py CHECKOUT CHECKOUT ... [--shape llama-2-7b] [--sparsity 0.5] [--positions 128,2048]
    benchmarks/in_turns.py . --selections top-k,threshold

Each checkout runs in a process of its own, with random weights that stay in memory while the others are timed. Run it
with the Python of an environment that has larosa; what is installed there is not what is timed. For `--device cpu` a
checkout needs its C++ library beside src/larosa/ops/cpu.
"""

from __future__ import annotations

import argparse
import os
import site
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--selections", default="top-k", help="of each checkout, separated by commas")
    parser.add_argument("--positions", default="128", help="where the measured tokens begin, separated by commas")
    parser.add_argument("--tokens", type=int, default=32, help="of a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Time each checkout at each position, and print medians of its turns."""
    given = options()
    if given.worker:
        work(given)
        return
    for checkout in given.checkouts:
        if not (checkout / "src/larosa").is_dir():
            raise SystemExit(f"{checkout}: no checkout, it has no src/larosa")
    workers = [Worker(*chosen) for chosen in product(given.checkouts, given.selections.split(","))]
    for worker in workers:  # all begin at once
        worker.wait()
    for position in given.positions.split(","):
        for turn in range(given.turns + 1):  # the first is not counted
            for worker in workers:
                milliseconds = worker.time(position)
                if turn:
                    worker.medians.append(milliseconds)
        first = statistics.median(workers[0].medians)
        for worker in workers:
            median = statistics.median(worker.medians)
            times = f"{median:.4f} ms ({min(worker.medians):.4f} to {max(worker.medians):.4f})"
            print(f"position {position}: {times}, {first / median:.4f}x  {worker.name}", flush=True)
            worker.medians.clear()


class Worker:
    """A process that times a checkout when it is told to."""

    def __init__(self, checkout: Path, selection: str) -> None:
        self.name = f"{checkout} {selection}"
        self.medians: list[float] = []
        # Without `site` an editable install, which would be found first, is not looked for.
        path = [
            str((checkout / "src").resolve()),
            *site.getsitepackages(),
            *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, "--worker", *sys.argv[1:], "--selections", selection],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "LAROSA_TURN": str(checkout.resolve())},
        )

    def wait(self) -> None:
        """Until its engine is there."""
        self._answer()

    def time(self, position: str) -> float:
        """The median of a turn's tokens, in milliseconds."""
        assert self._process.stdin
        self._process.stdin.write(f"{position}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process ended, see above")
        return answer


def work(given: argparse.Namespace) -> None:
    """Builds the engine, then answers each position that is asked for with the milliseconds of a token there."""
    import torch

    import larosa
    from larosa.benchmarks.shapes import random_sparse_model, set_sparsity, shape_config
    from larosa.config import Selection
    from larosa.decoding.engine import Engine

    assert Path(larosa.__file__).is_relative_to(os.environ["LAROSA_TURN"]), f"{larosa.__file__} would be timed"
    device = torch.device(given.device)
    config = shape_config(given.shape, layers=given.layers)
    config.dtype = getattr(torch, given.dtype)
    # An older checkout knows of counts alone.
    other = {} if given.selections == "top-k" else {"selection": Selection(given.selections)}
    model = random_sparse_model(config, config.dtype, device, **other)
    set_sparsity(model, given.sparsity)
    positions = [int(position) for position in given.positions.split(",")]
    engine = Engine(model, max(positions) + given.tokens + 3)
    run = turns_on_gpu(engine) if device.type == "cuda" else turns_on_cpu(engine)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt = torch.randint(config.vocab_size, (1, int(line)), generator=torch.Generator().manual_seed(0))
        print(statistics.median(run(prompt, given.tokens)), flush=True)


def turns_on_gpu(engine) -> Callable:
    """What runs a turn: a prompt and so many tokens, each one's milliseconds by the GPU's clock."""
    import torch

    from larosa.decoding.cuda_graph import GraphLoop
    from larosa.decoding.sampling import Sampler

    loop = GraphLoop(engine, Sampler(device=engine.device, kernels=True))

    def run(prompt, tokens: int) -> list[float]:
        loop.start(prompt)
        loop.advance()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(tokens + 1)]
        for i, event in enumerate(events):
            event.record()
            if i < tokens:
                loop.advance()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    return run


def turns_on_cpu(engine) -> Callable:
    """The same on the CPU."""
    import torch

    from larosa.decoding.sampling import Sampler

    sampler = Sampler()

    def run(prompt, tokens: int) -> list[float]:
        logits, position = engine.prefill(prompt), torch.tensor([prompt.shape[1]])
        times = [perf_counter()]
        for _ in range(tokens + 1):
            logits = engine.step(sampler(logits), position)
            position += 1
            times.append(perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(times[1:])]

    return run


if __name__ == "__main__":
    main()
