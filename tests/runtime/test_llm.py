from __future__ import annotations

import pytest
from transformers import AutoTokenizer

import larosa
from larosa import LarosaError
from larosa.data.bundled import bundled_model
from larosa.decoding.sampling import Sampling
from larosa.runtime import LLM, Request
from larosa.runtime.logprobs import TokenTexts


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_the_text_of_generate(make_model, quick_convert, tokenizer, options):
    model = quick_convert(make_model("qwen3"), dense_first_token=True)
    expected = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=30, **options)
    llm = LLM(model, tokenizer)
    session = llm.session()
    for _ in range(2):
        events = list(llm.stream(Request(llm.encode("w9 w10"), 30, Sampling(**options)), session))
        assert "".join(event.text for event in events) == expected.text
        assert len(events) == expected.tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}])
def test_the_text_of_lossless_generate(make_model, quick_convert, tokenizer, options):
    model = quick_convert(make_model("qwen3"), dense_first_token=True)
    more = {"max_new_tokens": 60, "lossless": True, "draft": "int8"}
    expected = larosa.generate(model, tokenizer, "w9 w10", **more, **options)
    llm = LLM(model, tokenizer, lossless=True, draft="int8")
    session = llm.session()
    for _ in range(2):
        events = list(llm.stream(Request(llm.encode("w9 w10"), 60, Sampling(**options)), session))
        assert "".join(event.text for event in events) == expected.text
        assert len(events) == expected.tokens
    assert session._speculation.verifications.accepted > 0


def test_a_draft_for_nothing(make_model, tokenizer):
    with pytest.raises(LarosaError, match="--draft says what drafts for --lossless: add that"):
        LLM(make_model("llama"), tokenizer, draft="int8")


def test_what_does_not_fit(make_model, tokenizer):
    model = make_model("llama")
    with pytest.raises(LarosaError, match="a length of 129 tokens: the model's context is 1 to 128"):
        LLM(model, tokenizer, 129)
    llm = LLM(model, tokenizer, 16)
    with pytest.raises(LarosaError, match="10 tokens and 7 new ones do not fit a session of 16"):
        next(llm.stream(Request([5] * 10, 7)))
    assert len(list(llm.stream(Request([5] * 10, 6)))) == 6


def test_no_tokens_at_all(make_model, tokenizer):
    llm = LLM(make_model("llama"), tokenizer)
    (event,) = llm.stream(Request([5, 6, 7], 0, prompt_logprobs=1))
    assert (event.token, event.text, event.finish_reason) == (None, "", "length")
    assert [row.token for row in event.prompt_logprobs] == [5, 6, 7]


TEXT = "The river — Ærø; 河は 🙂\n\nflows  on."


@pytest.fixture(scope="module")
def bundled():
    return AutoTokenizer.from_pretrained(bundled_model())


def test_the_bytes_of_tokens_are_the_text(bundled):
    texts, ids = TokenTexts(bundled), bundled(TEXT)["input_ids"]
    pairs = list(zip(ids, [None, *ids], strict=False))
    assert bytes(byte for token, before in pairs for byte in texts.bytes(token, before)).decode() == TEXT
    told = [texts.text(token, before) for token, before in pairs]
    assert any(text.startswith("bytes:\\x") for text in told)
    assert not any("\ufffd" in text for text in told)
    assert told[:2] == ["The", " river"]


def test_tokens_that_are_no_text_differ(bundled):
    told = [TokenTexts(bundled).text(token, None) for token in range(len(bundled))]
    assert len(set(told)) == len(told)


def test_special_tokens_are_shown(tokenizer):
    assert TokenTexts(tokenizer).text(2, 9) == " </s>"
