"""Linears of 16 bits that compute in float32."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from larosa.calibration import float32_arithmetic, precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at_a_time", [2**26, 50])
def test_outputs_and_gradients_are_those_of_the_wide_weight(monkeypatch, bias, at_a_time):
    monkeypatch.setattr(precision, "_WIDENED", at_a_time)  # 50: seven rows
    torch.manual_seed(0)
    linear = nn.Linear(7, 23, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x, gradient = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 23)
    with float32_arithmetic(linear, CPU):
        found = linear(x)
    expected = F.linear(x, linear.weight.float(), linear.bias.float() if bias else None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, expected)))


def test_no_wide_weight_is_kept_for_the_way_back():
    linear = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    kept = []
    with (
        float32_arithmetic(linear, CPU),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x),
    ):
        linear(torch.randn(1, 4, 64, requires_grad=True))
    assert kept == [torch.bfloat16]
