"""Whole generations, by both engines."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import larosa
from larosa import LarosaError
from larosa.data.bundled import bundled_model
from larosa.data.text import TextSplit, read_text, tokenize
from larosa.decoding import Engine, ForwardEngine
from larosa.decoding.loop import continue_prompt, stop_tokens
from larosa.decoding.sampling import Sampler

ENGINES = ("larosa", "transformers")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def greedy(model, ids, tokens):
    """The likeliest tokens, one after the other, without a cache."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -tokens:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_text(make_model, quick_convert, tokenizer, clear_ids, family, engine):
    model = quick_convert(make_model(family))
    model.generation_config.eos_token_id = None
    ids = clear_ids(model, 9, lambda ids: greedy(model, ids, 20))
    result = larosa.generate(model, tokenizer, tokenizer.decode(ids[0]), max_new_tokens=20, engine=engine)
    assert result.text == " " + tokenizer.decode(greedy(model, ids, 20), skip_special_tokens=True)
    assert (result.engine, result.prompt_tokens, result.tokens) == (engine, 9, 20)
    assert result.tokens_per_second > 0


SLOW = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[None, pytest.param(0.0, marks=SLOW), pytest.param(0.25, marks=SLOW), 0.5],
    ids=lambda sparsity: f"{sparsity}",
)
def bundled(request):
    """The bundled model in bfloat16, dense or converted, and its sparsity."""
    model = AutoModelForCausalLM.from_pretrained(bundled_model()).requires_grad_(False)
    if request.param is not None:
        model = larosa.convert(model, sparsity=request.param, num_sequences=2, sequence_length=256)
    return model, request.param


@pytest.fixture(scope="module")
def bundled_text():
    """16 windows of 32 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    return tokenize(read_text("bundled", TextSplit.TEST), tokenizer, len(tokenizer))[: 16 * 32].view(16, 32)


def test_256_tokens_of_the_bundled_model(bundled):
    model = copy.deepcopy(bundled[0]).float()
    ids = torch.tensor([[464, 21, 300, 45]])
    found = list(continue_prompt(Engine(model, 4 + 256), ids, 256, Sampler()))
    logits = model(torch.cat([ids, torch.tensor([found])], dim=1), use_cache=False).logits[0, 3:-1]
    assert found == logits.argmax(-1).tolist()


@pytest.mark.slow
def test_logits_of_the_bundled_model(bundled, bundled_text, step_logits):
    model, sparsity = copy.deepcopy(bundled[0]).float(), bundled[1]
    engine = Engine(model, 32)
    # Each step after a prompt of its own: where two entries tie for the k-th place but for the last bits, any two ways
    # of computing choose differently, and what a step leaves in the cache would make all later ones differ too.
    steps = [[step_logits(engine, ids[None, : at + 1], at)[-1] for at in range(8, 32)] for ids in bundled_text]
    found = torch.stack([torch.stack(rows) for rows in steps])
    expected = model(bundled_text, use_cache=False).logits[:, 8:]
    close = (found - expected).abs().amax(-1) <= 1e-4 * expected.abs().amax()
    assert float(close.float().mean()) >= (0.9 if sparsity else 1.0)


def test_the_bundled_model_in_bfloat16(bundled, bundled_text, step_logits):
    """No further from the float32 forward of the same weights than the bfloat16 forward is."""
    model, exact = bundled[0], copy.deepcopy(bundled[0]).float()
    engine = Engine(model, 32)
    found = torch.stack([step_logits(engine, ids[None], 8) for ids in bundled_text])
    own, expected = (m(bundled_text, use_cache=False).logits[:, 7:].float() for m in (model, exact))
    error, own_error = ((logits - expected).abs().amax(-1) for logits in (found, own))
    assert float(error.mean()) <= 1.2 * float(own_error.mean())
    first, second = expected.topk(2).values.unbind(-1)
    clear = first - second > 2 * own_error.amax()
    assert clear.any()
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("engine", ENGINES)
def test_follows_its_seed_alone(make_model, quick_convert, tokenizer, engine):
    model = quick_convert(make_model("llama"))

    def text(seed):
        return larosa.generate(
            model, tokenizer, "w9", max_new_tokens=30, temperature=1.0, top_p=0.9, seed=seed, engine=engine
        ).text

    torch.manual_seed(1)
    first = text(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert text(3) == first
    assert text(4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_both_engines_draw_the_same_text(make_model, quick_convert, tokenizer, clear_ids):
    model = quick_convert(make_model("qwen3"))

    def text(ids, engine):
        options = {"max_new_tokens": 30, "temperature": 0.8, "seed": 5}
        return larosa.generate(model, tokenizer, tokenizer.decode(ids[0]), engine=engine, **options).text

    ids = clear_ids(model, 5, lambda ids: text(ids, "transformers"))
    assert text(ids, "larosa") == text(ids, "transformers")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("several", [False, True])
def test_stops_after_an_end_token(make_model, tokenizer, engine, several):
    model, ids = make_model("llama"), torch.tensor([tokenizer("w9 w10")["input_ids"]])
    expected = greedy(model, ids, 12)
    end = expected[7]
    model.generation_config.eos_token_id = [end, 3] if several else end
    result = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=12, engine=engine)
    assert (result.tokens, result.finish_reason) == (expected.index(end) + 1, "stop")


@pytest.mark.parametrize("ends", [None, 2, [2, 5]])
def test_end_tokens_of_a_generation_configuration(make_model, ends):
    model = make_model("llama")
    model.generation_config.eos_token_id = ends
    assert stop_tokens(model) == {None: frozenset(), 2: {2}}.get(ends if ends != [2, 5] else "", {2, 5})


@pytest.mark.parametrize("engine", ENGINES)
def test_the_checkpoints_settings_apply_as_in_transformers(make_model, tokenizer, engine):
    model, ids = make_model("llama"), torch.tensor([tokenizer("w9 w10")["input_ids"]])
    model.generation_config.update(repetition_penalty=1.7, top_k=3, eos_token_id=None)
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=20)[0, 2:], skip_special_tokens=True)
    plain = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=20, engine=engine, repetition_penalty=1.0)
    found = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=20, engine=engine)
    assert found.text == " " + expected != plain.text


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_string_ends_the_text_and_is_not_in_it(make_model, tokenizer, engine):
    model, pieces = make_model("llama"), []
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 20, "engine": engine}
    whole = larosa.generate(model, tokenizer, "w9", **options)
    assert whole.finish_reason == "length"
    words = whole.text.split(" ")
    stop = f"{words[6][1:]} {words[7][:-1]}"  # from within a token to within the next
    expected = whole.text[: whole.text.index(stop)]
    for given in ([stop], ["w9999", stop, "never"]):
        pieces.clear()
        result = larosa.generate(model, tokenizer, "w9", stop=given, on_text=pieces.append, **options)
        assert result.text == "".join(pieces) == expected
        assert result.finish_reason == "stop"
        assert result.tokens < 20
    model.generation_config.stop_strings = stop
    assert larosa.generate(model, tokenizer, "w9", **options).text == expected


def test_a_stop_string_that_does_not_come_changes_nothing(make_model, tokenizer):
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    expected = larosa.generate(model, tokenizer, "w9", max_new_tokens=12).text
    stop = expected[-3:] + "never"  # the end of the text is its beginning
    assert larosa.generate(model, tokenizer, "w9", max_new_tokens=12, stop=[stop]).text == expected


def test_a_special_token_is_a_stop_string_too(make_model, tokenizer):
    model, ids = make_model("llama"), torch.tensor([tokenizer("w9 w10")["input_ids"]])
    model.generation_config.eos_token_id = None
    model.lm_head.weight[2] = 3 * model.lm_head.weight[greedy(model, ids, 6)[-1]]
    tokens = greedy(model, ids, 12)
    assert 2 in tokens
    result = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=12, stop=["</s>"])
    assert (result.tokens, result.finish_reason) == (tokens.index(2) + 1, "stop")


def test_an_empty_stop_string(make_model, tokenizer):
    with pytest.raises(LarosaError, match="--stop must not be empty"):
        larosa.generate(make_model("llama"), tokenizer, "w9", stop=["x", ""])


@pytest.mark.parametrize("engine", ENGINES)
def test_pieces_of_text_come_as_they_are_drawn(make_model, tokenizer, engine):
    model, pieces = make_model("llama"), []
    model.generation_config.eos_token_id = None
    result = larosa.generate(model, tokenizer, "w9", max_new_tokens=12, engine=engine, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert len(pieces) > 6


def test_an_empty_prompt_starts_from_the_beginning_token(make_model, tokenizer):
    model = make_model("llama")
    result = larosa.generate(model, tokenizer, "", max_new_tokens=5)
    assert result.text == tokenizer.decode(greedy(model, torch.tensor([[1]]), 5), skip_special_tokens=True)
    assert result.prompt_tokens == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(make_model, tokenizer, engine, temperature):
    model = make_model("llama")
    model.lm_head.weight[7] = float("nan")
    with pytest.raises(LarosaError, match="logits are NaN or Inf"):
        larosa.generate(model, tokenizer, "w9", max_new_tokens=4, engine=engine, temperature=temperature)


def test_nan_that_comes_up_on_the_way_is_an_error(make_model, quick_convert, tokenizer):
    model = quick_convert(make_model("llama"))
    engine = Engine(model, 16)
    tokens = continue_prompt(engine, torch.tensor([[9, 10]]), 8, Sampler())
    next(tokens)
    model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(LarosaError, match="logits are NaN or Inf"):
        list(tokens)


def test_a_stopped_generation_leaves_nothing_broken(make_model, quick_convert, token_ids):
    model, ids = quick_convert(make_model("llama")), token_ids(1, 9)
    engine = Engine(model, 40)
    expected = list(continue_prompt(engine, ids, 20, Sampler()))

    for after in (0, 3):
        calls = iter(range(20))

        class Interrupted(Sampler):
            def __call__(self, logits, calls=calls, after=after):
                if next(calls) == after:
                    raise KeyboardInterrupt
                return super().__call__(logits)

        with pytest.raises(KeyboardInterrupt):
            list(continue_prompt(engine, ids, 20, Interrupted()))
        assert list(continue_prompt(engine, ids, 20, Sampler())) == expected


@pytest.mark.parametrize("engine", ["gpu", ""])
def test_unknown_engine(make_model, tokenizer, engine):
    with pytest.raises(LarosaError, match=f"unknown engine '{engine}': one of larosa, transformers"):
        larosa.generate(make_model("llama"), tokenizer, "w9", engine=engine)


def test_what_the_engine_does_not_run_the_other_does(make_model, quick_convert, tokenizer):
    model = quick_convert(make_model("llama"), method="cats", sparsity=0.3)
    with pytest.raises(LarosaError, match="method cats: use --engine transformers"):
        larosa.generate(model, tokenizer, "w9", max_new_tokens=4)
    result = larosa.generate(model, tokenizer, "w9", max_new_tokens=4, engine="transformers")
    expected = greedy(model, torch.tensor([tokenizer("w9")["input_ids"]]), 4)
    assert result.text == " " + tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_engine_runs_several_sequences(make_model, token_ids, family):
    model, ids = make_model(family), token_ids(3, 20)
    engine = ForwardEngine(model)
    rows = [engine.prefill(ids[:, :9])]
    rows += [engine.step(ids[:, at], torch.tensor([at])) for at in range(9, 20)]
    expected = model(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(torch.stack(rows, dim=1), expected, rtol=0, atol=1e-4)
