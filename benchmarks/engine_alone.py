"""The engine alone, in turns: adapters' formats, changed kernels (`use`, `use_dir`) and positions in one process.

from engine_alone import *
model, e = engine("llama-3-8b", AdapterFormat.INT8)
loops = {"now": loop(e)}
use([("sparse_linear.cu", "ALONE ? 8 : 6", "ALONE ? 10 : 6")])
loops["ten"] = loop(e)
rounds(loops)
"""

import sys, time, statistics, math
import torch

t0 = time.time()


def say(*a):
    print(f"[{time.time() - t0:6.1f}]", *a, flush=True)


from larosa.benchmarks.shapes import *
from larosa.benchmarks import shapes as S
from larosa.config import AdapterFormat
from larosa.decoding.cuda_graph import GraphLoop
from larosa.decoding.engine import Engine
from larosa.decoding.sampling import Sampler
from larosa.ops.cuda import compiler, launch, kernels
import larosa.ops.cuda.plan as plan

texts0 = compiler._texts()
dev = torch.device("cuda", 0)
torch.cuda.set_device(dev)


def use(patches):
    texts = dict(texts0)
    for file, old, new in patches:
        assert old in texts[file], (file, old)
        texts[file] = texts[file].replace(old, new)
    compiler._texts = lambda: texts
    launch._load.cache_clear()


def use_dir(folder, patches=()):
    from pathlib import Path

    texts = {p.name: p.read_text() for p in Path(folder).iterdir()}
    for file, old, new in patches:
        assert old in texts[file], (file, old)
        texts[file] = texts[file].replace(old, new)
    compiler._texts = lambda: texts
    launch._load.cache_clear()


LEN = 384


def engine(shape, fmt, dtype=torch.float16, length=LEN, sparsity=0.5):
    cfg = shape_config(shape)
    cfg.dtype = dtype
    model = random_sparse_model(cfg, dtype, dev, layout=AdapterLayout(1, fmt))
    set_sparsity(model, sparsity)
    e = Engine(model, length)
    return model, e


def loop(e, position=192):
    l = GraphLoop(e, Sampler(device=dev, kernels=True))
    l.home = position
    return l


def rounds(loops, n=6, tokens=32):
    """loops: name -> GraphLoop; medians in turns."""
    res = {k: [] for k in loops}
    for r in range(n + 1):
        for k, l in loops.items():
            l._position.fill_(l.home)
            l._token.fill_(5)
            l.advance()
            l.advance()
            ev = [torch.cuda.Event(enable_timing=True) for _ in range(tokens + 1)]
            for i, x in enumerate(ev):
                x.record()
                if i < tokens:
                    l.advance()
            torch.cuda.synchronize()
            if r:
                res[k].append(statistics.median(a.elapsed_time(b) for a, b in zip(ev, ev[1:])))
    for k, v in res.items():
        say(f"   {k:40s} {statistics.median(v):.4f} ms  ({min(v):.4f}-{max(v):.4f})")
    return {k: statistics.median(v) for k, v in res.items()}
