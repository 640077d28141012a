"""From the logits of a step to its token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from larosa.errors import LarosaError
from larosa.ops.greedy import NO_TOKEN


class Sampler:
    """Draws tokens: greedily at temperature 0, else from the smallest set of tokens with `top_p` probability.

    Its own generator makes it follow its seed alone.

    Args:
        temperature: divides the logits.
        top_p: in (0, 1].
        seed: of the generator; the same seed and logits give the same tokens on the same device.
        banned: token ids that are never drawn.
        device: of the logits.
        kernels: take the likeliest token by `torch.ops.larosa.greedy`, for which a GPU's kernels must be there.

    Raises:
        LarosaError: an option is out of its range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        banned: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        kernels: bool = False,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise LarosaError(f"--temperature must be at least 0, not {temperature:g}")
        if not 0 < top_p <= 1:
            raise LarosaError(f"--top-p must be in (0, 1], not {top_p:g}")
        self._temperature = temperature
        self._top_p = top_p
        self._banned = torch.tensor(banned, dtype=torch.int64, device=device) if banned else None
        self._kernels = kernels
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The token drawn from logits [1, vocabulary] float32: [1] int64, `NO_TOKEN` where they are unusable."""
        greedy = self._banned is None and self._temperature == 0
        if greedy and self._kernels:
            token: torch.Tensor = torch.ops.larosa.greedy(logits)
            return token
        # Of a row with NaN, the maximum is NaN.
        highest, best = logits.max(dim=-1)
        # On the CPU looking costs less than to go on without.
        if greedy and logits.is_cpu and all(map(math.isfinite, highest.tolist())):
            return best
        usable = highest.isfinite()
        if self._banned is not None:
            logits = logits.index_fill(-1, self._banned, -torch.inf)
            best = logits.argmax(dim=-1)
        if self._temperature > 0:
            logits = torch.where(usable[:, None], logits, 0)
            best = self._draw(torch.softmax(logits / self._temperature, dim=-1))
        return torch.where(usable, best, NO_TOKEN)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is drawn meanwhile, the tokens drawn afterwards are the same."""
        state = self.generator.get_state()
        yield
        self.generator.set_state(state)

    def _draw(self, probabilities: torch.Tensor) -> torch.Tensor:
        if self._top_p == 1:
            return self._drawn_index(probabilities)
        ranked, tokens = probabilities.topk(self._candidates(probabilities), dim=-1)
        # A token belongs to the set if those before it do not reach top_p.
        before = ranked.cumsum(dim=-1) - ranked
        chosen = self._drawn_index(torch.where(before < self._top_p, ranked, 0))
        return tokens.gather(-1, chosen[:, None])[:, 0]

    def _candidates(self, probabilities: torch.Tensor) -> int:
        """How many tokens are likely enough for the set: all that are less so than this have not 1 - top_p together.

        Few, as a rule, so that a large vocabulary need not be sorted; elsewhere than on the CPU counting would wait.
        """
        vocabulary = probabilities.shape[-1]
        if probabilities.device.type != "cpu":
            return vocabulary
        return int((probabilities > (1 - self._top_p) / vocabulary).sum(dim=-1).max().clamp_min(1))

    def _drawn_index(self, weights: torch.Tensor) -> torch.Tensor:
        """An index of each row of `weights` [B, N], in proportion to them; never one whose weight is 0."""
        sums = weights.double().cumsum(dim=-1)
        shape = (len(weights), 1)
        drawn = torch.rand(shape, dtype=torch.float64, generator=self.generator, device=weights.device) * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp_max(weights.shape[-1] - 1)
