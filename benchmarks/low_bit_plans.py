#!/usr/bin/env python3
"""How fast products by few bits are when they are divided over a GPU in other ways than `low_bit_plan` chooses.

    benchmarks/low_bit_plans.py --shape llama-3-8b --weights int4 --sparsity 0.5

For each matrix of a layer, and the head, it prints GB/s of the chosen plan and of the best others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch

from larosa.benchmarks.gpu_kernels import low_bit_matrices, random_codes
from larosa.benchmarks.gpu_timing import time_captured
from larosa.benchmarks.shapes import shape_config
from larosa.formats import ColumnFormat, Int4, Int8
from larosa.ops.cuda import launch as cuda_launch
from larosa.ops.cuda import low_bit
from larosa.ops.cuda.compiler import compiled
from larosa.ops.cuda.launch import Machine, machine
from larosa.ops.cuda.plan import SPARSE_THREADS, SparsePlan, low_bit_plan

_COPIES_BYTES = 256 << 20
_LOADS = (3, 4, 5, 6)
_MOST_ROUNDS = 2.1  # blocks a multiprocessor; of the head more


def plans(gpu: Machine, outputs: tuple[int, ...], width: int) -> Iterator[SparsePlan]:
    """All that give work to most multiprocessors."""
    for tile, cluster, loads in product(range(128, SPARSE_THREADS + 1, 64), (1, 2, 4, 8), _LOADS):
        plan = SparsePlan(tile // width, cluster, tile, loads)
        blocks = sum(-(-size // plan.tile) for size in outputs) * cluster / gpu.multiprocessors
        if blocks >= 0.6 and (blocks <= _MOST_ROUNDS or cluster == 1):
            yield plan


def measure(form: ColumnFormat, outputs: tuple[int, ...], depth: int, sparsity: float, rounds: int) -> None:
    """Print what each plan comes to."""
    device, width = torch.device("cuda", 0), 128 // form.bits
    kept = depth - round(sparsity * depth)
    values = torch.randn(1, kept, device=device)
    indices = torch.randperm(depth, device=device)[:kept].sort().values.int()[None] if sparsity else None
    column = sum(form.column_bytes(size) for size in outputs)
    copies = max(2, -(-_COPIES_BYTES // (column * depth)))
    weights = [random_codes(form, outputs, depth, device) for _ in range(copies)]
    gpu = machine(torch.device("cuda", 0))
    chosen = low_bit_plan(gpu, outputs, kept, width)
    every = {chosen, *plans(gpu, outputs, width)}

    def call(plan: SparsePlan) -> Any:
        def run(copy: int) -> torch.Tensor:
            low_bit.low_bit_plan = lambda *_, **__: plan
            return low_bit.low_bit_linear(values, indices, *weights[copy], [None] * len(outputs))

        return run

    compile_all([call(plan) for plan in every])
    times = {}
    for plan in every:
        times[plan] = time_captured({"": call(plan)}, copies, rounds)[""].median
    for plan in [chosen, *sorted(every, key=lambda plan: times[plan])[:6]]:
        rate = column * kept / times[plan] / 1e9
        mark = "chosen" if plan == chosen else ""
        print(
            f"  lanes {plan.lanes:2d} cluster {plan.cluster} loads {plan.loads}: {1e6 * times[plan]:6.2f} us "
            f"{rate:6.0f} GB/s {mark}",
            flush=True,
        )


def compile_all(calls: list[Any]) -> None:
    """Compile what they launch, side by side."""
    wanted: list[tuple[str, dict[str, str]]] = []
    launch = cuda_launch.launch
    cuda_launch.launch = lambda device, source, kernel, macros, grid, arguments: wanted.append((source, dict(macros)))
    for call in calls:
        call(0)
    cuda_launch.launch = launch
    architecture = machine(torch.device("cuda", 0)).architecture
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: compiled(*each, architecture), wanted))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--weights", default="int4,int8")
    parser.add_argument("--sparsity", default="0,0.5")
    parser.add_argument("--matrices", default="q+k+v,o,gate+up,down", help="also: head")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    forms = {form.name: form(form.usual_group) for form in (Int4, Int8)}
    matrices = low_bit_matrices(shape_config(arguments.shape))
    for weights, name in product(arguments.weights.split(","), arguments.matrices.split(",")):
        outputs, depth = matrices[name]
        for sparsity in map(float, arguments.sparsity.split(",")):
            print(f"{weights} {name} {outputs} x {depth} at {sparsity:.0%}")
            measure(forms[weights], outputs, depth, sparsity, arguments.rounds)


if __name__ == "__main__":
    main()
