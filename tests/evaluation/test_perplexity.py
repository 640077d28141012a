import math

import pytest
import torch
from transformers import DynamicCache

import larosa
from larosa import LarosaError
from larosa.architectures import cache_argument
from larosa.evaluation.perplexity import RecordedLogits, evaluate_windows, evaluation_windows


@pytest.fixture
def text(tmp_path, words):
    """text(count): the path of a file of so many random tokens."""

    def make(count):
        path = tmp_path / f"{count}.txt"
        path.write_text(words(count, seed=9), "utf-8")
        return str(path)

    return make


def by_hand(model, path, tokenizer, length, dense=None):
    """GPTQ's convention: exp of the windows' mean loss; with `dense`, divergence and agreement by token too."""
    with open(path, encoding="utf-8") as file:
        ids = [tokenizer.convert_tokens_to_ids(word) for word in file.read().split()]
    losses, divergences, agreements = [], [], []
    for start in range(0, len(ids) - length + 1, length):
        window = torch.tensor([ids[start : start + length]])
        p = model(window).logits[0].double().softmax(-1)
        losses.append(sum(-math.log(p[i, window[0, i + 1]]) for i in range(length - 1)) / (length - 1))
        if dense is not None:
            q = dense(window).logits[0].double().softmax(-1)[:-1]
            divergences += (q * (q / p[:-1]).log()).sum(-1).tolist()
            agreements += (q.argmax(-1) == p[:-1].argmax(-1)).tolist()
    if dense is None:
        return math.exp(sum(losses) / len(losses))
    return (
        math.exp(sum(losses) / len(losses)),
        sum(divergences) / len(divergences),
        sum(agreements) / len(agreements),
    )


@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize(("count", "length"), [(100, 24), (97, 32), (8, 2)])
def test_perplexity_by_hand(make_model, quick_convert, tokenizer, text, sparsity, count, length):
    model = make_model("llama") if sparsity is None else quick_convert(make_model("llama"), sparsity=sparsity)
    found = larosa.evaluate(model, tokenizer, text(count), sequence_length=length)
    assert found.perplexity == pytest.approx(by_hand(model, text(count), tokenizer, length), rel=1e-5)
    assert (found.windows, found.sequence_length) == (count // length, length)
    assert found.tokens == count // length * (length - 1)
    assert found.kl_divergence is None
    assert found.top1_agreement is None


def test_divergence_and_agreement_by_hand(make_model, quick_convert, tokenizer, text):
    dense, model = make_model("qwen2"), quick_convert(make_model("qwen2"))
    found = larosa.evaluate(model, tokenizer, text(120), sequence_length=30, reference=dense)
    perplexity, divergence, agreement = by_hand(model, text(120), tokenizer, 30, dense)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-4)
    assert found.top1_agreement == agreement
    assert 0.1 < agreement < 0.9  # both outcomes occur
    reverse = larosa.evaluate(dense, tokenizer, text(120), sequence_length=30, reference=model)
    assert reverse.kl_divergence != pytest.approx(divergence, rel=1e-3)  # the direction matters


def test_a_model_agrees_with_itself(make_model, tokenizer, text):
    model = make_model("llama")
    found = larosa.evaluate(model, tokenizer, text(64), sequence_length=32, reference=model)
    assert (found.kl_divergence, found.top1_agreement) == (pytest.approx(0, abs=1e-9), 1.0)


def test_keys_and_values_of_8_bits(make_model, quick_convert, tokenizer, text, rounded_cache):
    model, data = quick_convert(make_model("llama")), text(70)
    found = larosa.evaluate(model, tokenizer, data, sequence_length=16, reference=model, kv_cache_dtype="int8")
    windows = evaluation_windows(model, tokenizer, data, 16, None)
    caches = [cache_argument(model, rounded_cache()) for _ in windows]
    rounded = [model(w[None], **c).logits[0, :-1].log_softmax(-1) for w, c in zip(windows, caches, strict=True)]
    losses = [-log_p[torch.arange(15), ids[1:]].mean() for log_p, ids in zip(rounded, windows, strict=True)]
    assert found.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
    as_it_is = larosa.evaluate(model, tokenizer, data, sequence_length=16, reference=model)
    assert as_it_is.kl_divergence < 1e-9 < found.kl_divergence < 0.01


def test_recorded_logits_are_a_reference(make_model, quick_convert, tokenizer, text):
    model = make_model("llama")
    windows = evaluation_windows(model, tokenizer, text(96), 32, None)
    recorded = RecordedLogits(model, windows)
    found = evaluate_windows(quick_convert(model), windows, recorded)
    expected = larosa.evaluate(model, tokenizer, text(96), sequence_length=32, reference=make_model("llama"))
    assert found.to_dict() == expected.to_dict()


def test_long_windows_are_scored_whole(make_model, quick_convert, tokenizer, text):
    # Longer than what is put through softmax at a time, and no multiple of it.
    sizes = {"max_position_embeddings": 2048, "num_hidden_layers": 1}
    dense, model = make_model("llama", **sizes), quick_convert(make_model("llama", **sizes))
    found = larosa.evaluate(model, tokenizer, text(1200), sequence_length=1100, reference=dense)
    perplexity, divergence, agreement = by_hand(model, text(1200), tokenizer, 1100, dense)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-4)
    assert found.top1_agreement == agreement
    assert found.tokens == 1099


@pytest.mark.parametrize("options", [{}, {"prefill": "dense"}, {"dense_first_token": True}, {"method": "teal"}])
@pytest.mark.parametrize("prompt", [1, 7, None, 18])
@pytest.mark.one_of(3)
def test_continuation_is_what_decoding_behind_a_dense_prompt_does(
    make_model, quick_convert, tokenizer, text, options, prompt
):
    # Without a value rotation its keys and values are the dense model's own.
    method = {} if "method" in options else {"value_rotation": False}
    dense, model = make_model("llama"), quick_convert(make_model("llama"), **method, **options)
    found = larosa.evaluate(
        *(model, tokenizer, text(45)),
        **{"sequence_length": 20, "reference": dense, "protocol": "continuation", "prompt_length": prompt},
    )
    length = 10 if prompt is None else prompt
    losses, divergences = [], []
    for window in evaluation_windows(model, tokenizer, text(45), 20, None):
        cache = DynamicCache()
        dense(window[None, :length], use_cache=True, **cache_argument(dense, cache))
        expected = dense(window[None]).logits[0].double().log_softmax(-1)
        for position in range(length, 19):
            token = window[None, position : position + 1]
            (logits,) = model(token, use_cache=True, **cache_argument(model, cache)).logits[0]
            log_p = logits.double().log_softmax(-1)
            losses.append(-float(log_p[window[position + 1]]))
            divergences.append(float((expected[position].exp() * (expected[position] - log_p)).sum()))
    assert (found.protocol, found.prompt_length, found.tokens) == ("continuation", length, 2 * (19 - length))
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    spread = found.comparison.kl_divergence
    assert found.kl_divergence == spread.mean.value == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert (spread.min, spread.max) == pytest.approx((min(divergences), max(divergences)), rel=1e-3)
    assert spread.min > 1e-4  # no dense prediction among them
    every = larosa.evaluate(model, tokenizer, text(45), sequence_length=20, reference=dense)
    assert every.kl_divergence != pytest.approx(found.kl_divergence, rel=1e-3)
    # What the prompt skips, nothing, is not counted.
    assert found.actual_sparsity.min > 0.3


def test_a_prompt_does_not_outlive_the_measurement(make_model, quick_convert, tokenizer, token_ids, text):
    model, ids = quick_convert(make_model("llama")), token_ids(1, 20)
    before = model(ids).logits
    larosa.evaluate(model, tokenizer, text(64), sequence_length=32, protocol="continuation")
    assert torch.equal(model(ids).logits, before)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(make_model, tokenizer, text):
    model = make_model("llama")
    model.lm_head.weight.zero_()
    assert larosa.evaluate(model, tokenizer, text(64), sequence_length=16).perplexity == pytest.approx(128, rel=1e-6)


def test_dense_prefill_is_measured_sparse(make_model, quick_convert, tokenizer, text):
    models = {prefill: quick_convert(make_model("llama"), prefill=prefill) for prefill in ("sparse", "dense")}
    found = {name: larosa.evaluate(model, tokenizer, text(64), sequence_length=32) for name, model in models.items()}
    assert found["dense"].to_dict() == found["sparse"].to_dict()
    plain = larosa.evaluate(make_model("llama"), tokenizer, text(64), sequence_length=32)
    assert found["dense"].perplexity != pytest.approx(plain.perplexity, rel=0.01)


def test_dense_prefill_is_dense_again_afterwards(make_model, quick_convert, tokenizer, token_ids, text):
    model, ids = quick_convert(make_model("llama"), prefill="dense"), token_ids(1, 20)
    before = model(ids).logits
    larosa.evaluate(model, tokenizer, text(64), sequence_length=32)
    assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(before, make_model("llama")(ids).logits, rtol=0, atol=1e-4)


def test_reports_the_models_sparsity_and_zeros(make_model, quick_convert, tokenizer, text):
    model = quick_convert(make_model("llama"), sparsity=0.25, search="none")
    found = larosa.evaluate(model, tokenizer, text(64), sequence_length=32)
    assert found.sparsity == larosa.inspect(model).sparsity
    assert found.zeros["h4"].mean == pytest.approx(0.25)
    dense = larosa.evaluate(make_model("llama"), tokenizer, text(64), sequence_length=32)
    assert dense.zeros is None
    assert dense.sparsity.weights == 0


@pytest.mark.parametrize(("maximum", "windows"), [(1, 1), (2, 2), (3, 3), (4, 4), (9, 4)])
def test_max_sequences_takes_the_first_windows(make_model, tokenizer, text, words, maximum, windows):
    found = evaluation_windows(make_model("llama"), tokenizer, text(70), 16, maximum)
    ids = tokenizer(words(70, seed=9))["input_ids"]
    assert found.flatten().tolist() == ids[: windows * 16]


def test_default_length_is_the_models_context(make_model, tokenizer, text):
    assert evaluation_windows(make_model("llama"), tokenizer, text(300), None, None).shape == (2, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "--sequence-length 1 is outside"),
        ({"sequence_length": 129}, "--sequence-length 129 is outside the model's context of 2 to 128"),
        ({"sequence_length": -3}, "--sequence-length -3 is outside"),
        ({"sequence_length": 0}, "--sequence-length 0 is outside"),
        ({"max_sequences": 0}, "--max-sequences must be at least 1, not 0"),
        ({"kv_cache_dtype": "int4"}, "unknown kv_cache_dtype 'int4': one of auto, int8"),
        ({"protocol": "some"}, "unknown protocol 'some': one of all, continuation"),
        (
            {"prompt_length": 8, "sequence_length": 32},
            "--prompt-length is of the dense prompt: give --protocol continuation",
        ),
        (
            {"protocol": "continuation", "prompt_length": 0, "sequence_length": 32},
            "--prompt-length 0 must be at least 1",
        ),
        (
            {"protocol": "continuation", "prompt_length": 63, "sequence_length": 64},
            "--prompt-length 63 must be at least 1 and leave 2 of the window's 64 tokens",
        ),
        ({"sequence_length": 65}, "has 64 tokens, less than one window"),
    ],
)
def test_bad_options(make_model, tokenizer, text, options, message):
    with pytest.raises(LarosaError, match=message):
        larosa.evaluate(make_model("llama"), tokenizer, text(64), **options)


def test_refuses_a_reference_of_another_vocabulary(make_model, tokenizer, text):
    other = make_model("llama", vocab_size=130)
    with pytest.raises(LarosaError, match="vocabulary of 130, the model of 128"):
        larosa.evaluate(make_model("llama"), tokenizer, text(64), sequence_length=16, reference=other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_logits_are_an_error(make_model, tokenizer, text, value):
    model = make_model("llama")
    model.lm_head.weight[5] = value
    with pytest.raises(LarosaError, match="logits"):
        larosa.evaluate(model, tokenizer, text(64), sequence_length=16)
