"""What it costs that each rank keeps its share of its own entries of h2 and h4, in one process.

    python benchmarks/shares.py CONVERTED DENSE --ranks 2,4,8 --rounding 2

Prints the divergence from the dense model on the bundled text with entries chosen over the whole vector, and among
those of each of so many parts. A part of h2 need be no whole number of heads. Rows of `--rounding` are of one rank
whose embeddings are moved by a ten-millionth: what any other order of sums does to a choice that is close.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from larosa.architectures import find_architecture
from larosa.checkpoints.io import load
from larosa.evaluation.perplexity import evaluate
from larosa.models import TopK
from larosa.parallel.shard import SHARDED


class TopKOfEachPart(TopK):
    """Keeps of each of some parts of a vector its share of the k largest entries."""

    parts = 1

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Sparsify x [..., D] unconditionally."""
        width = x.shape[-1]
        kept = []
        for part in range(self.parts):
            own = slice(width * part // self.parts, width * (part + 1) // self.parts)
            k = self.k * (part + 1) // self.parts - self.k * part // self.parts
            kept.append(TopK(k, score=None if self.score is None else self.score[own]).select(x[..., own]))
        return torch.cat(kept, dim=-1)


def main() -> None:
    """Measure and print a row for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("converted")
    parser.add_argument("dense")
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--rounding", type=int, default=0)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-sequences", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = load(options.converted)
    dense = load(options.dense).model
    architecture = find_architecture(model.config.model_type)
    for layer in architecture.layers(model):
        for site in SHARDED:
            linear: Any = architecture.linears(layer, site)[0]
            linear.selector.__class__ = TopKOfEachPart

    def row(name: str) -> None:
        windows = {"sequence_length": options.sequence_length, "max_sequences": options.max_sequences}
        found = evaluate(model, tokenizer, reference=dense, **windows)
        print(f"{name:>10}  {found.kl_divergence:.4f}  {found.top1_agreement:.1%}  {found.perplexity:.3f}", flush=True)

    print("     ranks  KL divergence, same top token, perplexity")
    for ranks in map(int, options.ranks.split(",")):
        TopKOfEachPart.parts = ranks
        row(str(ranks))
    TopKOfEachPart.parts = 1
    for seed in range(options.rounding):
        torch.manual_seed(seed)
        embedding = architecture.embedding(model)
        moved = embedding.register_forward_hook(
            lambda _module, _inputs, x: x.float() * (1 + 1e-7 * torch.randn(x.shape))
        )
        row("1, rounded")
        moved.remove()


if __name__ == "__main__":
    main()
