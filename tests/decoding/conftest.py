"""What the engine's tests compare: logits of a text, position by position, where no choice of entries is close.

Where two entries tie for the k-th place but for the last bits, two ways of computing the same choose differently,
and everything after that token differs; transformers' forward with a cache and without one do, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from larosa.models import Selector, Threshold, TopK

#: Margins relative to the entry itself. Rounding moves an entry by about 1e-6 of it.
CLEAR = 2e-5

#: What is decoded losslessly: how a tiny model is converted, or not at all.
LOSSLESS = {
    "dense": None,
    "none": {"rotation": "none"},
    "layer": {"rotation": "layer"},
    "int8 adapters": {"adapters": "int8", "rotation": "block"},
    "thresholds": {"rotation": "layer", "selection": "threshold"},
    "first token dense": {"dense_first_token": True},
    "few bits": {"weights": "int4"},
}


@pytest.fixture(scope="session")
def step_logits() -> Callable[..., torch.Tensor]:
    """step_logits(engine, ids, prompt): the logits after each of ids [1, length] from the prompt's last on."""

    def run(engine: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        rows = [engine.prefill(ids[:, :prompt])]
        rows += [engine.step(ids[0, at : at + 1], torch.tensor([at])) for at in range(prompt, ids.shape[1])]
        return torch.cat(rows)

    return run


@pytest.fixture(scope="session")
def margin() -> Callable[..., float]:
    """margin(model, run): how far the closest of the model's choices in run() is from going the other way."""

    def measure(model: Any, run: Callable[[], object]) -> float:
        margins = [math.inf]
        chosen = [module for module in model.modules() if isinstance(module, Selector)]
        hooks = [module.register_forward_pre_hook(lambda m, x: margins.append(_margin(m, x[0]))) for module in chosen]
        run()
        for hook in hooks:
            hook.remove()
        return min(margins)

    return measure


def _margin(selector: Selector, x: torch.Tensor) -> float:
    magnitude = selector.copies(x).double().abs()
    if isinstance(selector, Threshold):
        magnitude = magnitude if selector.score is None else magnitude * selector.score
        return float(((magnitude - selector.threshold).abs() / magnitude.clamp_min(1e-30)).min())
    assert isinstance(selector, TopK)
    if selector.k in (0, x.shape[-1]):
        return math.inf
    ranked = (magnitude if selector.score is None else magnitude * selector.score).sort(descending=True).values
    last, next_ = ranked[..., selector.k - 1], ranked[..., selector.k]
    return float(((last - next_) / last).min())


@pytest.fixture(scope="session")
def clear_ids(token_ids: Callable[..., torch.Tensor], margin: Callable[..., float]) -> Callable[..., torch.Tensor]:
    """clear_ids(model, length, run): random token ids [1, length] on which no choice in run(ids) is close.

    Where there is no `run`, it is the forward of the whole text.
    """

    def find(model: Any, length: int, run: Callable[[torch.Tensor], object] | None = None) -> torch.Tensor:
        forward = run or (lambda ids: model(ids, use_cache=False))
        texts = (token_ids(1, length, seed=seed) for seed in range(200))
        return next(ids for ids in texts if margin(model, partial(forward, ids)) > CLEAR)

    return find


@pytest.fixture
def make_lossless(make_model, quick_convert):
    def build(family, conversion="none", **overrides):
        model, options = make_model(family, **overrides), LOSSLESS[conversion]
        return model if options is None else quick_convert(model, **options)

    return build


@pytest.fixture
def make_draft(make_model, quick_convert):
    """make_draft(family): a conversion of the same model by 4 bits, with values in the dense model's basis."""

    def build(family, **overrides):
        model = make_model(family, **overrides)
        return quick_convert(model, sparsity=0.0, weights="int4", value_rotation=False)

    return build
