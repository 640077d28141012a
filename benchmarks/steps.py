#!/usr/bin/env python3
"""A few steps of the decode engine through two layers of full-size shapes, kernel by kernel: for compute-sanitizer.

    compute-sanitizer --tool racecheck benchmarks/steps.py cuda llama-3-8b llama-2-7b

Tests of kernels take small sizes, which are divided over a GPU in other ways than these.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from larosa.benchmarks.shapes import random_sparse_model, set_sparsity, shape_config
from larosa.config import Selection
from larosa.decoding import CacheDtype, Engine
from larosa.ops.cuda.launch import early_launches

TOKENS = 3
ROWS = 5
CACHE = 300  # positions, for which blocks of a cluster share a head


def main(device: torch.device, shapes: list[str]) -> None:
    """Steps through each shape, and says whether its logits are finite."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    for shape in shapes:
        config = shape_config(shape, layers=2, vocab_size=1000)
        config.dtype = dtype
        for selection, kv_cache_dtype in product(Selection, CacheDtype):
            model = random_sparse_model(config, dtype, device, selection=selection)
            set_sparsity(model, 0.5)
            engine = Engine(model, CACHE, kv_cache_dtype)
            with torch.inference_mode(), early_launches():  # as in the engine's graph
                for position in range(TOKENS):
                    token = torch.tensor([position], device=device)
                    logits = engine.step(token, torch.tensor([position], device=device))
                # Several at once, and with everything read.
                several = torch.arange(TOKENS, TOKENS + ROWS, device=device)
                for each in (engine, engine.beside(engine.weights.whole())):
                    logits = torch.cat([logits, each.step(several, several)])
            what = f"with {selection}, and keys and values in {kv_cache_dtype}"
            if not logits.isfinite().all():
                raise SystemExit(f"{shape}: logits are not finite {what}")
            print(f"{shape}: logits are finite {what}", flush=True)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), sys.argv[2:])
