"""Tokens that stay dense: the first of a text, and prompts by the state of the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import larosa
from larosa.architectures import cache_argument, find_architecture
from larosa.calibration import attached, layer_statistics
from larosa.config import SITES
from larosa.decoding.engine import Engine
from larosa.evaluation.zeros import sparse_prompts
from larosa.models import selectors


def dense_rows(model, run):
    """For each position of what `run` does, whether every entry passes every selector."""
    seen, handles = [], []
    for found in selectors(model, find_architecture(model.config.model_type)).values():
        for selector in found:
            handles.append(
                selector.register_forward_hook(lambda _m, given, out: seen.append((given[0] == out).all(-1)))
            )
    run()
    for handle in handles:
        handle.remove()
    assert len(seen) == len(SITES) * len(model.model.layers)
    return torch.stack(seen).all(0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("method", ["larosa", "topk", "teal"])
def test_the_first_token_alone_is_dense(make_model, quick_convert, token_ids, family, method):
    model = quick_convert(make_model(family), method=method, dense_first_token=True, sparsity=0.5)
    rows = dense_rows(model, lambda: model(token_ids(2, 9)))
    assert rows.tolist() == [[True] + [False] * 8] * 2


def test_its_position_counts_not_its_place(make_model, quick_convert, token_ids):
    model = quick_convert(make_model("llama"), dense_first_token=True)
    cache = DynamicCache()
    model(token_ids(1, 4), use_cache=True, **cache_argument(model, cache))
    rows = dense_rows(model, lambda: model(token_ids(1, 3), use_cache=True, **cache_argument(model, cache)))
    assert not rows.any()
    # Padded on the left, the first token of a text comes later.
    positions = torch.tensor([[1, 1, 0, 1, 2]])
    rows = dense_rows(model, lambda: model(token_ids(1, 5), position_ids=positions))
    assert rows.tolist() == [[False, False, True, False, False]]


def test_the_engine_agrees_with_the_forward(make_model, quick_convert, token_ids):
    model, ids = quick_convert(make_model("llama"), dense_first_token=True), token_ids(1, 7)
    expected = model(ids).logits[:, -1].float()
    engine = Engine(model, 8)
    engine.prefill(ids[:, :1])
    for position in range(1, 7):
        found = engine.step(ids[0, position : position + 1], torch.tensor([position]))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)


def test_a_prompt_is_what_comes_before_the_cache_holds_anything(make_model, quick_convert, token_ids):
    model, cache = quick_convert(make_model("llama"), prefill="dense"), DynamicCache()
    call = lambda length: model(token_ids(1, length), use_cache=True, **cache_argument(model, cache))  # noqa: E731
    assert dense_rows(model, lambda: call(5)).all()
    # Several positions behind a prompt, as prompt lookup and assistants verify them, are no prompt.
    assert not dense_rows(model, lambda: call(3)).any()
    assert not dense_rows(model, lambda: call(1)).any()


def test_a_prompt_of_one_token_is_dense(make_model, quick_convert, token_ids):
    model, cache = quick_convert(make_model("llama"), prefill="dense"), DynamicCache()
    assert dense_rows(model, lambda: model(token_ids(1, 1), use_cache=True, **cache_argument(model, cache))).all()


def test_without_a_cache_nothing_is_a_prompt(make_model, quick_convert, token_ids):
    model = quick_convert(make_model("llama"), prefill="dense")
    assert not dense_rows(model, lambda: model(token_ids(1, 5), use_cache=False)).any()


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}])
def test_dense_prompts_generate_the_same_however_steps_are_cut(make_model, quick_convert, token_ids, options):
    model, ids = quick_convert(make_model("llama"), prefill="dense"), token_ids(1, 12)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, **options), plain)


def test_a_measurement_can_take_a_prefix_for_a_dense_prompt(make_model, quick_convert, token_ids):
    model, ids = quick_convert(make_model("llama")), token_ids(1, 8)
    with sparse_prompts(model, dense_before=3):
        assert dense_rows(model, lambda: model(ids)).tolist() == [[True] * 3 + [False] * 5]
    assert not dense_rows(model, lambda: model(ids)).any()


def test_statistics_leave_the_first_token_out(make_model, token_ids):
    model, ids, cpu = make_model("llama"), token_ids(3, 9), torch.device("cpu")
    architecture = find_architecture("llama")
    seen = []
    with attached(architecture.tap_unit_norm(model.model.layers[0], "h1", seen.append)):
        model(ids)
    (found, *_) = layer_statistics(model, architecture, ids, cpu, first=1)
    x = seen[0][:, 1:].flatten(0, 1).double()
    torch.testing.assert_close(found.moments.h1, x.T @ x / len(x), atol=1e-5, rtol=1e-5)


def test_the_choice_is_recorded(make_model, quick_convert):
    for choice in (True, False):
        model = quick_convert(make_model("llama"), dense_first_token=choice)
        assert larosa.config.LarosaConfig.parse(model.config.larosa).dense_first_token is choice
