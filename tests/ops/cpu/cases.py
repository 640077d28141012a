"""What the tests of kernels draw: settings, shapes and values of every kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from larosa.errors import LarosaError
from larosa.ops.cpu import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40)
#: Odd ones, those about the vector widths 4, 8 and 16, and some that fill several cache lines.
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 255, 511, 512, 513, 700, 1030]))
INTEGERS = {2: torch.int16, 4: torch.int32}


def available() -> list[str]:
    """The instruction sets that this processor has."""
    current, found = library.isa(), []
    for isa in library.ISAS:
        try:
            library.set_isa(isa)
            found.append(isa)
        except LarosaError:
            pass
    library.set_isa(current)
    return found


ISAS = available()


@dataclass(frozen=True)
class Chance:
    """Random tensors of one case; the numbers that hypothesis shrinks are their seed and sizes."""

    generator: torch.Generator
    kind: str
    threads: int

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`shape`, starting anywhere in its storage.

        Its kind: normal; small integers, whose sums are exact and whose magnitudes tie; those with a few special
        values among them; or wild, of magnitudes from 1e-16 to 1e16, or as far as the dtype goes.
        """
        skip = int(torch.randint(0, 4, (), generator=self.generator))
        count = math.prod(shape)
        x = torch.randn(skip + count, generator=self.generator, dtype=torch.float64)
        if self.kind in ("integer", "special"):
            x = (2 * x).round()
        if self.kind == "special":
            where = torch.rand(len(x), generator=self.generator) < 0.03
            which = torch.randint(len(SPECIAL), (len(x),), generator=self.generator)
            x = torch.where(where, torch.tensor(SPECIAL, dtype=torch.float64)[which], x)
        if self.kind == "wild":
            reach = 4 if dtype == torch.float16 else 16
            x *= 10 ** (reach * (2 * torch.rand(len(x), generator=self.generator, dtype=torch.float64) - 1))
        return x.to(dtype)[skip:].view(shape)

    def run(self, operator: Callable[..., Any], *arguments: Any) -> Any:
        """The operator's result on this case's number of threads; PyTorch's own work crawls on more than there are."""
        torch.set_num_threads(self.threads)
        try:
            return operator(*arguments)
        finally:
            torch.set_num_threads(1)

    def maybe(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Such a tensor or None."""
        return self.tensor(*shape, dtype=dtype) if torch.rand((), generator=self.generator) < 0.5 else None


@st.composite
def chances(draw: st.DrawFn, *kinds: str) -> Chance:
    """Chance of one of the kinds; sets the instruction set, and whose threads are used, too."""
    library.set_isa(draw(st.sampled_from(ISAS)))
    library.share_threads(library.load(), draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(kinds or ("normal", "integer", "special", "wild")))
    return Chance(generator, kind, draw(st.sampled_from([1, 1, 2, 3, 8])))


def bits(x: torch.Tensor) -> torch.Tensor:
    """To compare bit by bit, but all NaN alike."""
    whole = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
    return whole.contiguous().view(INTEGERS[x.element_size()])


def doubled(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()
