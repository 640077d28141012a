"""What the engine's tests compare: logits of a text, position by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def step_logits() -> Callable[..., torch.Tensor]:
    """step_logits(engine, ids, prompt): the logits after each of ids [1, length] from the prompt's last on."""

    def run(engine: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        rows = [engine.prefill(ids[:, :prompt])]
        rows += [engine.step(ids[0, at : at + 1], torch.tensor([at])) for at in range(prompt, ids.shape[1])]
        return torch.cat(rows)

    return run
