"""What PyTorch may rely on of a GPU's operators: their schemas, shapes on paper, and what they write to."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from larosa.ops import column_major
from larosa.ops.backend import OPERATORS

from .cases import Target, entries

ops = torch.ops.larosa


# Of the sizes in test_repeatability, for which the emulator has compiled the kernels already.


def x(width: int = 600) -> torch.Tensor:
    return entries("normal", 1, width, seed=3)


def kept() -> tuple[torch.Tensor, torch.Tensor]:
    return x(300), torch.arange(0, 600, 2, dtype=torch.int32)[None]


def weights(count: int = 1, outputs: int = 200) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    return [column_major(entries("normal", outputs, 600, seed=0).half()) for _ in range(count)], [None] * count


def adapter(outputs: int) -> tuple[torch.Tensor, ...]:
    digits = torch.arange(110 * outputs).to(torch.int8).view(110, outputs).t()
    return x(90), digits, torch.full((outputs,), 2**-7)


def few_bits(outputs: int = 512, columns: int = 600) -> tuple[Any, ...]:
    codes = torch.arange(columns * outputs // 2).to(torch.uint8).view(columns, -1)
    return [codes], [torch.full((columns, outputs // 32), 2**-3, dtype=torch.bfloat16)], [outputs], 32, "int4", [None]


def scores() -> torch.Tensor:
    """Of two columns an entry."""
    return x(1200)[0].abs()


def attention(dtype: torch.dtype) -> tuple[Any, ...]:
    cache = [(30 * entries("normal", 2, 90, 16, seed=seed)).to(dtype) for seed in (1, 2)]
    scales = torch.ones(2, 90, 2, dtype=torch.bfloat16) if dtype == torch.int8 else None
    return x(128), *cache, torch.tensor([80]), *[None] * 4, 0.0, 0.25, 0, scales


CALLS = {
    "rms_norm": lambda: (x(), None, 1e-5),
    "silu_mul": lambda: (x(),),
    "top_k": lambda: (x(), 300, None),
    "rms_norm_top_k": lambda: (x(), None, 1e-5, 300, None),
    "silu_mul_top_k": lambda: (x(), 150, None),
    "above": lambda: (x(), 0.5, None),
    "rms_norm_above": lambda: (x(), None, 1e-5, 0.5, None),
    "silu_mul_above": lambda: (x(), 0.5, None),
    "above of two columns": lambda: (x(), 0.5, scores()),
    "silu_mul_above of two columns": lambda: (x(1200), 0.5, scores()),
    "linear": lambda: (x(), [weights()[0][0].contiguous()], [None], None),
    "sparse_linear": lambda: (*kept(), *weights(), None),
    "sparse_linear of a counted list": lambda: (*kept(), *weights(), *[None] * 3, torch.tensor([200])),
    "sparse_linear with an adapter": lambda: (*kept(), *weights(), *adapter(200)),
    "top_k_linear": lambda: (x(), 300, None, *weights(), None),
    # A layer that fills the GPU that stands in for a large one: one block selects for all.
    "top_k_linear with a board": lambda: (
        *(x(), 300, None, *weights(outputs=192), *adapter(192)),
        torch.zeros(1, dtype=torch.int64),
    ),
    "rms_norm_top_k_linear": lambda: (x(), None, 1e-5, 300, None, *weights(), None),
    "rms_norm_top_k_swiglu": lambda: (x(), None, 1e-5, 300, None, *weights(2)),
    "above_linear": lambda: (x(), 0.5, None, *weights(), None),
    "above_linear with an adapter": lambda: (x(), 0.5, None, *weights(outputs=192), *adapter(192)),
    "rms_norm_above_linear": lambda: (x(), None, 1e-5, 0.5, None, *weights(), None),
    "rms_norm_above_swiglu": lambda: (x(), None, 1e-5, 0.5, None, *weights(2)),
    "low_bit_linear": lambda: (*kept(), *few_bits()),
    "low_bit_linear of a counted list": lambda: (*kept(), *few_bits(), None, torch.tensor([200])),
    "low_bit_linear of two columns": lambda: (x(), None, *few_bits(columns=1200)),
    "low_bit_site": lambda: (x(), None, 1e-5, None, None, None, False, *few_bits()),
    "low_bit_site of two columns": lambda: (x(), None, None, scores(), None, 0.5, False, *few_bits(columns=1200)),
    "attend": lambda: attention(torch.float16),
    "attend of digits": lambda: attention(torch.int8),
    "greedy": lambda: (x(),),
    "embed": lambda: (weights()[0][0].contiguous(), torch.tensor([3, 199])),
}


def test_every_operator_is_tried():
    assert {name.split()[0] for name in CALLS} == set(OPERATORS)


@pytest.fixture
def dispatched(target: Target) -> Iterator[Target]:
    """The target's kernels behind `torch.ops.larosa`, on whatever device they run."""
    library = torch.library.Library("larosa", "IMPL")
    for name in OPERATORS:
        library.impl(name, getattr(target.kernels, name), target.device.type.upper(), allow_override=True)
    yield target
    library._destroy()


@pytest.mark.usefixtures("selects_from_short_ones")
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # that they are overridden
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(dispatched, name):
    arguments = [dispatched._move(argument) for argument in CALLS[name]()]
    # What compilation makes of an operator follows from its schema, which is the same for all kernels.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(ops, name.split()[0]).default, arguments, test_utils=checks)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_written_is_declared(name):
    written = {a.name for a in getattr(ops, name).default._schema.arguments if a.alias_info and a.alias_info.is_write}
    assert written == {"attend": {"keys", "values", "scales"}, "top_k_linear": {"board"}}.get(name, set())


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second of the memory's."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


BAD = {
    "odd gate_up": ("silu_mul", (x(61),), "two vectors"),
    "odd gate_up to select from": ("silu_mul_top_k", (x(61), 10, None), "two vectors"),
    "strided x": ("rms_norm", (strided(x()), None, 1e-5), "contiguous"),
    "a strided gain": ("rms_norm", (x(), strided(torch.ones(600)), 1e-5), "contiguous"),
    "strided values": ("sparse_linear", (strided(kept()[0]), kept()[1], *weights(), None), "contiguous"),
    "strided indices": ("sparse_linear", (kept()[0], strided(kept()[1]), *weights(), None), "contiguous"),
    "a strided residual": ("linear", (x(), [torch.ones(40, 600)], [None], strided(x(40))), "contiguous"),
    "a board of floats": ("top_k_linear", (x(), 300, None, *weights(), *adapter(200), torch.zeros(1)), "board"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_bare_addresses_would_misread_is_refused(target, name):
    operator, arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        target(operator, *arguments)


def test_tokens_that_are_strided(target):
    embedding, tokens = entries("normal", 9, 20, seed=1), strided(torch.tensor([3, 8]))
    if target.kernels.__name__.startswith("larosa.ops.cuda"):
        with pytest.raises(ValueError, match="tokens must be contiguous"):
            target("embed", embedding, tokens)
    else:  # PyTorch's own
        assert torch.equal(target("embed", embedding, tokens), embedding[tokens])
