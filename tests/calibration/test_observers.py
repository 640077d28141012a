import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples import examples

from larosa import LarosaError
from larosa.calibration import Magnitudes, attached

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gather(*parts):
    magnitudes = Magnitudes("layer 3, site h2")
    for part in parts:
        magnitudes.see(part)
    return magnitudes.finish()


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    parts=st.lists(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=9), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
@settings(max_examples=examples(60))
def test_quantiles_equal_sorting_by_hand(dtype, parts, share):
    tensors = [torch.tensor([part], dtype=dtype) for part in parts]
    found = gather(*tensors)
    by_hand = sorted(abs(v) for tensor in tensors for v in tensor.flatten().tolist())
    rank = round(share * len(by_hand))
    threshold = found.threshold(share)
    assert threshold == (by_hand[rank - 1] if rank else 0)
    assert found.dropped(threshold) == sum(v <= threshold for v in by_hand) / len(by_hand)
    assert found.dropped(threshold) >= rank / len(by_hand)  # more where there are ties


def test_the_ends():
    found = gather(torch.tensor([[3.0, -1.0], [2.0, -4.0]]))
    assert [found.threshold(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0, 1, 2, 3, 4]
    assert (found.dropped(0), found.dropped(4)) == (0, 1)


def test_activations_are_left_alone():
    x = torch.tensor([3.0, -1.0, 2.0])
    gather(x)
    assert x.tolist() == [3, -1, 2]


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_activations_are_named(dtype, value):
    with pytest.raises(LarosaError, match="layer 3, site h2: calibration activations are NaN or Inf"):
        gather(torch.ones(2, 3, dtype=dtype), torch.tensor([1.0, value, 2.0], dtype=dtype))


def test_hooks_are_detached_after_an_error():
    module = torch.nn.Identity()
    with pytest.raises(KeyboardInterrupt), attached(module.register_forward_hook(lambda *_: None)):
        raise KeyboardInterrupt
    assert not module._forward_hooks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype):
    x = torch.randn(1000, dtype=torch.float64).to(dtype)
    cpu, cuda = gather(x), gather(x.cuda())
    for share in (0.0, 0.1, 0.5, 0.99, 1.0):
        assert cuda.threshold(share) == cpu.threshold(share)
        assert cuda.dropped(cuda.threshold(share)) == cpu.dropped(cpu.threshold(share))
