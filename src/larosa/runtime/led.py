"""An engine of several ranks, whose texts the first rank writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from larosa.decoding import Engine
from larosa.decoding.steps import Steps
from larosa.parallel import Lead


class LedEngine:
    """Each rank's engine of the same texts: what the first rank's sessions run, all ranks run.

    Args:
        engine: of this rank's shard.
        steps: of that engine.
    """

    def __init__(self, engine: Engine, steps: Steps, lead: Lead) -> None:
        self.max_length = engine.max_length

        # Numbers, for they are told sooner than tensors.
        def extend(tokens: list[int], start: int, text: int) -> torch.Tensor:
            return engine.extend(torch.tensor([tokens]), start, text)

        def step(tokens: list[int], positions: list[int], texts: int | Sequence[int]) -> torch.Tensor:
            return steps(torch.tensor(tokens), torch.tensor(positions), texts)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            return engine.logits(hidden.to(engine.device))

        self._extend, self._step, self._logits = lead.shared(extend), lead.shared(step), lead.shared(logits)
        self._take = lead.shared(partial(engine.take, engine))

    def extend(self, tokens: torch.Tensor, start: int, text: int = 0) -> torch.Tensor:
        """As of `Engine`."""
        return self._extend(tokens[0].tolist(), start, text)

    def steps(self, tokens: torch.Tensor, positions: torch.Tensor, texts: int | Sequence[int]) -> torch.Tensor:
        """As of `Steps`."""
        return self._step(tokens.tolist(), positions.tolist(), texts)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As of `Engine`."""
        return self._logits(hidden.cpu())

    def take(self, other: LedEngine, length: int, source: int = 0, text: int = 0) -> None:
        """Between two texts of this engine; see `Engine`."""
        assert other is self, "others have texts of their own"
        self._take(length, source, text)
