"""No operator takes tensors of several devices: PyTorch gives them to the kernel of one, which follows addresses."""

import pytest
import torch

from larosa.ops.backend import OPERATORS

from .cpu.test_contract import CALLS as CPU_CALLS
from .gpu.test_contract import CALLS as GPU_CALLS

ops = torch.ops.larosa
CALLS = {**GPU_CALLS, **CPU_CALLS}
#: What lies beside the others, wherever these are.
ELSEWHERE = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


def moved(arguments, which, device):
    """The arguments, with the tensor of that number on another device."""
    count = 0

    def move(value):
        nonlocal count
        if isinstance(value, list):
            return [move(each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        count += 1
        return value.to(device) if count == which else value

    found = [move(value) for value in arguments]
    return found, count


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("name", CALLS)
def test_one_tensor_elsewhere_is_refused_by_name(name, elsewhere):
    operator = getattr(ops, name.split()[0])
    # Where the other device has no kernel for it, PyTorch says so itself.
    message = rf"larosa::{name.split()[0]}: \w+ is on .* on .*: move all to one device|Could not run 'larosa::"
    _, tensors = moved(CALLS[name](), 0, elsewhere)
    for which in range(1, tensors + 1) if tensors > 1 else ():
        with pytest.raises((ValueError, NotImplementedError), match=message):
            operator(*moved(CALLS[name](), which, elsewhere)[0])


def test_every_operator_is_tried():
    assert {name.split()[0] for name in CALLS} >= {*OPERATORS, "above", "rms_norm_above", "silu_mul_above", "adapt"}


@pytest.mark.parametrize("name", CALLS)
def test_all_of_them_on_meta_give_shapes(name):
    arguments = CALLS[name]()
    for which in range(1, moved(arguments, 0, "meta")[1] + 1):
        arguments, _ = moved(arguments, which, "meta")
    result = getattr(ops, name.split()[0])(*arguments)
    assert {part.device.type for part in (result if isinstance(result, tuple) else (result,))} == {"meta"}


def test_an_argument_by_name_is_looked_at_too():
    with pytest.raises(ValueError, match="x is on cpu and residual on meta"):
        ops.linear(torch.ones(1, 8), [torch.ones(4, 8)], [None], residual=torch.ones(1, 4, device="meta"))
