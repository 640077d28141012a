import pytest
import torch

from larosa import LarosaError
from larosa.calibration.self_sampling import sample_sequences

VOCABULARY = 128
EOS = 2


def memoryless(make_model, logits, **overrides):
    """A model whose next-token logits are the given ones whatever came before."""
    model = make_model("llama", num_hidden_layers=1, attention_bias=False, mlp_bias=False, **overrides)
    model.model.embed_tokens.weight.fill_(1)
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1)
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, 0] = logits  # the final hidden state is all ones
    return model


def test_draws_from_the_models_own_distribution(make_model):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[EOS] = 8  # the likeliest by far, and still not drawn
    ids = sample_sequences(memoryless(make_model, logits), 1000, 9, seed=0)
    counts = ids[:, 1:].flatten().bincount(minlength=VOCABULARY).double()
    assert counts[EOS] == 0
    expected = logits.double().exp()
    expected[EOS] = 0
    expected *= 8000 / expected.sum()
    others = expected > 0
    chi_square = float(((counts - expected)[others].square() / expected[others]).sum())
    freedom = VOCABULARY - 2
    # A chi-square has mean `freedom` and twice that as variance; a truncated tail or another temperature is far off.
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("length", [1, 2, 17])
def test_shape_and_start(make_model, length):
    ids = sample_sequences(make_model("llama"), 5, length, seed=0)
    assert ids.shape == (5, length)
    assert ids.dtype == torch.int64
    assert bool((ids[:, 0] == 1).all())
    assert not bool((ids == EOS).any())


def test_starts_anywhere_without_a_beginning_token(make_model):
    ids = sample_sequences(make_model("qwen2", bos_token_id=None), 40, 3, seed=0)
    assert len(ids[:, 0].unique()) > 20


def test_follows_its_seed_alone(make_model):
    model = make_model("llama")
    torch.manual_seed(1)
    first = sample_sequences(model, 3, 10, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(sample_sequences(model, 3, 10, seed=4), first)
    assert not torch.equal(sample_sequences(model, 3, 10, seed=5), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.01},
        {"top_k": 1},
        {"top_p": 0.01},
        {"min_p": 0.9},
        {"typical_p": 0.01},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_ignores_the_checkpoints_generation_settings(make_model, setting):
    # Checkpoints ship a generation_config.json for chatting, which is not the model's own distribution.
    model = make_model("llama")
    expected = sample_sequences(model, 3, 10, seed=0)
    model.generation_config.update(do_sample=True, **setting)
    assert torch.equal(sample_sequences(model, 3, 10, seed=0), expected)


def test_nan_logits_are_an_error(make_model):
    model = make_model("llama")
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(LarosaError, match="NaN"):
        sample_sequences(model, 2, 8, seed=0)
