"""Steps of an engine, as those call them who do not wait for each: captured on a GPU, plain on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from larosa.decoding.cuda_graph import StepGraphs
from larosa.decoding.engine import Engine
from larosa.decoding.layers import MAX_ROWS


class Steps(Protocol):
    """Runs tokens of an engine's texts; see `Engine.step`."""

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, texts: int | Sequence[int]) -> torch.Tensor:
        """Logits [B, vocabulary], which are the caller's to keep.

        Args:
            tokens: [B], on the CPU or the engine's device, as positions are.
            positions: [B].
            texts: which one all tokens are of, or each.
        """
        ...


def steps_of(engine: Engine, most: int = MAX_ROWS) -> Steps:
    """Those of up to so many tokens, and no more than a step takes."""
    if engine.device.type == "cpu":
        return PlainSteps(engine)
    return CapturedSteps(engine, min(most, MAX_ROWS, engine.max_length))


class PlainSteps:
    """`Engine.step` as it is."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, texts: int | Sequence[int]) -> torch.Tensor:
        """See `Steps`."""
        of_each = [texts] * len(tokens) if isinstance(texts, int) else texts
        return self._engine.step(tokens.to(self._engine.device), positions.to(self._engine.device), of_each)


class CapturedSteps:
    """CUDA graphs for each number of rows, all captured at once: later nobody is kept waiting for that.

    What trying them leaves in the cache stands where a prompt is written next.
    """

    @torch.inference_mode()
    def __init__(self, engine: Engine, most: int) -> None:
        self._graphs = StepGraphs(engine)
        self._graphs.positions.copy_(torch.arange(MAX_ROWS))
        for rows in range(1, most + 1):
            self._graphs.step(rows)

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, texts: int | Sequence[int]) -> torch.Tensor:
        """See `Steps`."""
        rows, graphs = len(tokens), self._graphs
        graphs.tokens[:rows].copy_(tokens)
        graphs.positions[:rows].copy_(positions)
        if isinstance(texts, int):
            graphs.texts[:rows].fill_(texts)
        else:
            graphs.texts[:rows].copy_(torch.tensor(texts))
        return graphs.step(rows).clone()
