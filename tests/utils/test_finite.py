"""What a number format does not hold is refused, and not blamed on the checkpoint."""

from __future__ import annotations

import pytest
import torch

import larosa


@pytest.fixture
def wide(make_model, token_ids):
    """A sound model of float16 with a gain and a weight whose product float16 does not hold, for a tiny activation."""
    model = make_model("llama", torch.float16)
    layer = model.model.layers[0]
    model.model.embed_tokens.weight[:, 3] = 1e-5
    layer.input_layernorm.weight[3] = 40
    layer.self_attn.q_proj.weight[0, 3] = 3e4
    assert model(token_ids(1, 9)).logits.isfinite().all()
    return model


@pytest.mark.parametrize("rotation", ["layer", "model", "random", "block"])
def test_a_weight_that_overflows_once_rotated(wide, quick_convert, rotation):
    with pytest.raises(larosa.LarosaError, match="overflows float16 once rotated: use --dtype bfloat16"):
        quick_convert(wide, rotation=rotation)


def test_the_same_in_bfloat16(wide, quick_convert):
    quick_convert(wide.to(torch.bfloat16))


@pytest.mark.parametrize("options", [{}, {"recipe": "paper", "search": "none"}])
def test_activations_that_overflow_once_rotated(make_model, quick_convert, token_ids, options):
    model = make_model("llama", torch.float16)
    model.model.embed_tokens.weight.copy_(1e4 + 10 * torch.randn(128, 32))
    model.model.layers[0].self_attn.o_proj.bias.fill_(5e3)  # on one axis both together are beyond 65504
    assert model(token_ids(1, 9)).logits.isfinite().all()
    with pytest.raises(larosa.LarosaError, match="use --dtype bfloat16"):
        quick_convert(model, **options)


def test_a_damaged_checkpoint(make_model, quick_convert):
    model = make_model("llama")
    model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(larosa.LarosaError, match=r"weight 'lm_head\.weight' holds NaN or Inf; is the checkpoint sound"):
        quick_convert(model)
