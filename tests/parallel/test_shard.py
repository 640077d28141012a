"""Ranks together give what one process gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from larosa import LarosaError
from larosa.architectures import find_architecture
from larosa.checkpoints.io import load, save
from larosa.decoding import Engine, ForwardEngine, generate
from larosa.decoding.lossless import LosslessDecoder
from larosa.evaluation.perplexity import evaluate
from larosa.models import TopK
from larosa.parallel import Over, Ranks
from tests.decoding.conftest import clear_ids, margin, step_logits  # noqa: F401 - fixtures

LENGTH, PROMPT = 16, 7
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CONVERSIONS = {
    "dense": None,
    "layer": {"rotation": "layer"},
    "block, 8 bits": {"rotation": "block", "adapters": "int8"},
    "thresholds": {"rotation": "layer", "selection": "threshold"},
    "magnitude": {"score": "magnitude"},
    "4 bits": {"weights": "int4", "weight_group": 32},
    "4 bits, layer, 8 bits": {"weights": "int4", "weight_group": 32, "rotation": "layer", "adapters": "int8"},
    "8 bits, thresholds": {"weights": "int8", "weight_group": 32, "selection": "threshold"},
    "6 bits": {"weights": "int6", "weight_group": 32},
    "4 + 4 bits": {"weights": "int4+4", "weight_group": 32, "selection": "threshold"},
}


@pytest.fixture
def saved(make_model, quick_convert, tokenizer, tmp_path):
    """saved(family, conversion, **overrides): a model of 4 key heads, and the folder that it is in."""

    def build(family, conversion, **overrides):
        folder = tmp_path / "model"
        sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, **overrides}
        model = make_model(family, **sizes)
        if CONVERSIONS[conversion] is None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            save(quick_convert(model, sparsity=0.4, **CONVERSIONS[conversion]), tokenizer, folder, "")
        return load(str(folder)).model, str(folder)

    return build


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def check(model, folder, ids, on_ranks, load_here, step_logits, size=2, over=Over.ALL, engine=True):  # noqa: F811
    """The shards' logits, by their forward, step by step and by the engine, are those of the model's forward."""
    expected = model(ids, use_cache=False).logits[0, PROMPT - 1 :]

    def run(ranks):
        shard = load_here(folder, ranks)
        found = [shard(ids, use_cache=False).logits[0, PROMPT - 1 :], step_logits(ForwardEngine(shard), ids, PROMPT)]
        return [*found, step_logits(Engine(shard, LENGTH), ids, PROMPT)] if engine else found

    first, *others = on_ranks(size, run, over)
    for logits in first:
        assert_close(logits, expected)
    for other in others:  # who draws from them draws the same
        assert all(torch.equal(mine, its) for mine, its in zip(first, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.one_of(2)
def test_every_family(saved, on_ranks, load_here, clear_ids, step_logits, family):  # noqa: F811
    model, folder = saved(family, "block, 8 bits")
    check(model, folder, clear_ids(model, LENGTH), on_ranks, load_here, step_logits)


@pytest.mark.parametrize("conversion", ["dense", "layer", "thresholds", "magnitude"])
@pytest.mark.one_of(2)
def test_every_conversion(saved, on_ranks, load_here, clear_ids, step_logits, conversion):  # noqa: F811
    model, folder = saved("llama", conversion, tie_word_embeddings=conversion == "dense", vocab_size=128)
    check(model, folder, clear_ids(model, LENGTH), on_ranks, load_here, step_logits)


def test_four_ranks_and_what_they_cannot_share_evenly(saved, on_ranks, load_here, clear_ids, step_logits):  # noqa: F811
    model, folder = saved("llama", "layer", intermediate_size=58, hidden_size=40, vocab_size=130)
    check(model, folder, clear_ids(model, LENGTH), on_ranks, load_here, step_logits, size=4)


@pytest.mark.parametrize("conversion", ["4 bits", "6 bits", "4 + 4 bits"])
def test_few_bits(saved, on_ranks, load_here, clear_ids, step_logits, conversion):  # noqa: F811
    """By the forward, which dequantises: the engine rounds activations in other blocks than one process does."""
    model, folder = saved("llama", conversion, head_dim=32, intermediate_size=128)
    check(model, folder, clear_ids(model, LENGTH), on_ranks, load_here, step_logits, engine=False)


class EachPart(nn.Module):
    """Keeps of each of some parts of a vector its share of the k largest."""

    def __init__(self, selector, parts):
        super().__init__()
        self.selector, self.parts = selector, parts

    def forward(self, x):
        k, score = self.selector.k, self.selector.score
        scores = score.chunk(self.parts)
        shares = [k * (part + 1) // self.parts - k * part // self.parts for part in range(self.parts)]
        own = zip(x.chunk(self.parts, dim=-1), shares, scores, strict=True)
        return torch.cat([TopK(share, score=score).select(part) for part, share, score in own], dim=-1)


def test_each_rank_keeps_its_share_of_its_own_entries(saved, on_ranks, load_here, clear_ids, step_logits):  # noqa: F811
    model, folder = saved("llama", "layer")
    ids = clear_ids(model, LENGTH)
    layers = find_architecture("llama").layers(model)
    for layer in layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.selector = EachPart(linear.selector, 2)
    check(model, folder, ids, on_ranks, load_here, step_logits, over=Over.OWN)


def test_shares_of_a_count_add_up_and_fit():
    for size in range(1, 6):
        for total in range(1, 23):
            every = [Ranks(rank, size, torch.device("cpu")) for rank in range(size)]
            for count in range(total + 1):
                shares = [ranks.share(count, total) for ranks in every]
                parts = [ranks.part(total) for ranks in every]
                assert sum(shares) == count
                assert all(0 <= k <= part.stop - part.start for k, part in zip(shares, parts, strict=True))


def test_a_rank_holds_its_part_alone(saved, on_ranks, load_here):
    model, folder = saved("llama", "layer")
    whole = {name: weight.numel() for name, weight in model.named_parameters()}
    (shard, _) = on_ranks(2, lambda ranks: load_here(folder, ranks), Over.OWN)
    for name, weight in shard.named_parameters():
        halves = ("proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias")
        shared = name.endswith((*halves, "adapter.weight", "proj.selector.score")) or name == "lm_head.weight"
        assert weight.numel() == whole[name] // (1 + shared), name
        assert weight.untyped_storage().nbytes() == weight.nbytes, name


def test_what_cannot_be_shared_is_refused(saved, on_ranks, load_here):
    _, folder = saved("llama", "layer")
    with pytest.raises(LarosaError, match="3 ranks cannot share 4 key-value heads evenly: start 1, 2, 4 of them"):
        on_ranks(3, lambda ranks: load_here(folder, ranks))


@pytest.mark.parametrize("over", Over)
def test_an_evaluation_on_ranks_is_one_of_the_whole_model(saved, on_ranks, load_here, tokenizer, text_file, over):
    """Its counts of zeros too, which each rank has of its own entries."""
    model, folder = saved("llama", "layer")
    options = {"data": str(text_file), "sequence_length": 32}
    expected = evaluate(model, tokenizer, **options)
    found, other = on_ranks(2, lambda ranks: evaluate(load_here(folder, ranks), tokenizer, **options), over)
    assert found == other
    assert (found.sparsity, found.zeros, found.tokens) == (expected.sparsity, expected.zeros, expected.tokens)
    assert found.actual_sparsity == expected.actual_sparsity
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-3 if over is Over.ALL else 0.2)


def test_lossless_mode_is_refused(saved, on_ranks, load_here):
    _, folder = saved("llama", "layer")
    with pytest.raises(LarosaError, match="--lossless runs in one process"):
        on_ranks(2, lambda ranks: LosslessDecoder(load_here(folder, ranks), 16))


def test_ranks_draw_the_same_tokens(saved, on_ranks, load_here, tokenizer):
    model, folder = saved("llama", "thresholds")
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    found = on_ranks(2, lambda ranks: generate(load_here(folder, ranks), tokenizer, "w5 w9 w7", **options).text)
    assert found == [generate(model, tokenizer, "w5 w9 w7", **options).text] * 2
