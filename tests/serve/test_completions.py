from __future__ import annotations

import copy
import json

import pytest
import torch

from larosa.decoding.sampling import Sampling

PROMPT = "w9 w10 w11 w12 w13"


def post(http, **body):
    response = http.post("/v1/completions", json={"model": "sparse", "prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    return response.json()


def text_of(events):
    return "".join(event.text for event in events)


@pytest.mark.parametrize("model", ["dense", "sparse"])
def test_the_text_is_that_of_the_engine(http, alone, model):
    answer = post(http, model=model, max_tokens=20, temperature=0)
    events = alone(model, PROMPT, 20)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": text_of(events), "logprobs": None, "finish_reason": events[-1].finish_reason}
    assert (answer["object"], answer["model"]) == ("text_completion", model)
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == len(events)
    assert answer["usage"]["total_tokens"] == 5 + len(events)


def test_sampling_options_reach_the_sampler(http, alone):
    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}
    expected = alone("sparse", PROMPT, 30, Sampling(**options))
    assert post(http, max_tokens=30, **options)["choices"][0]["text"] == text_of(expected)
    without = alone("sparse", PROMPT, 30, Sampling(1.0, seed=7))
    assert post(http, max_tokens=30, seed=7)["choices"][0]["text"] == text_of(without) != text_of(expected)


def test_without_a_seed_texts_differ(http):
    texts = {post(http, max_tokens=20)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_several_choices_of_several_prompts(http, alone):
    prompts = ["w20 w21", "w30"]
    answer = post(http, prompt=prompts, n=3, max_tokens=10, seed=5)
    expected = [
        text_of(alone("sparse", prompt, 10, Sampling(1.0, seed=5 + choice)))
        for prompt in prompts
        for choice in range(3)
    ]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", [[9, 10, 11], [[9, 10, 11]]])
def test_prompts_of_token_ids(http, alone, prompt):
    expected = text_of(alone("sparse", [9, 10, 11], 12))
    assert post(http, prompt=prompt, max_tokens=12, temperature=0)["choices"][0]["text"] == expected


def test_16_tokens_where_nobody_says(http):
    usage = post(http, prompt="w9", temperature=0)["usage"]
    assert usage["completion_tokens"] == 16


def test_stop_strings(http, alone):
    whole = text_of(alone("sparse", PROMPT, 30))
    words = whole.split()
    stop = f"{words[5][-2:]} {words[6]}"  # over the border of two tokens
    choice = post(http, max_tokens=30, temperature=0, stop=["never", stop])["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    streamed = stream(http, max_tokens=30, temperature=0, stop=["never", stop])
    assert "".join(piece["choices"][0]["text"] for piece in streamed) == choice["text"]


def test_an_end_token_stops(http, alone):
    texts = [alone("sparse", PROMPT, 200, Sampling(1.0, seed=seed)) for seed in range(20)]
    seed, events = next((i, events) for i, events in enumerate(texts) if events[-1].token == 2)
    choice = post(http, max_tokens=200, seed=seed)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text_of(events), "stop")


def stream(http, **body):
    """The pieces of a stream, which must end as it should."""
    content = {"model": "sparse", "prompt": PROMPT, "stream": True, **body}
    with http.stream("POST", "/v1/completions", json=content) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_is_the_text_in_pieces(http, alone):
    pieces = stream(http, max_tokens=20, temperature=0, stream_options={"include_usage": True})
    events = alone("sparse", PROMPT, 20)
    assert [piece["choices"][0]["text"] for piece in pieces[:-1]] == [event.text for event in events]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * 19 + ["length"]
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] == 20
    assert len({piece["id"] for piece in pieces}) == 1


def test_a_stream_of_several_choices(http, alone):
    pieces = stream(http, max_tokens=10, n=2, seed=5)
    for choice in range(2):
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice]
        assert "".join(piece["text"] for piece in own) == text_of(
            alone("sparse", PROMPT, 10, Sampling(1.0, seed=5 + choice))
        )


class TestLogprobs:
    """Held to a float64 log-softmax of the model's own logits."""

    @pytest.fixture
    def reference(self, loaded):
        model = copy.deepcopy(loaded["dense"].model).double()
        return lambda ids: model(torch.tensor([ids])).logits[0].log_softmax(-1)

    @pytest.fixture
    def ids_of(self, tokenizer):
        return lambda texts: tokenizer.convert_tokens_to_ids([text.strip() for text in texts])

    @pytest.mark.parametrize("length", [5, 300])  # one piece of a prompt, and several
    @pytest.mark.parametrize("max_tokens", [0, 6])
    def test_of_prompt_and_text(self, http, reference, ids_of, token_ids, length, max_tokens):
        prompt = token_ids(length, seed=length).tolist()
        post(http, model="dense", prompt=prompt, max_tokens=1)  # a prefix to reuse, which must not happen
        body = {"model": "dense", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "echo": True}
        choice = post(http, **body, logprobs=4)["choices"][0]
        told = choice["logprobs"]
        assert len(told["tokens"]) == length + max_tokens
        assert told["tokens"][0] == f"w{prompt[0]}"
        assert "".join(told["tokens"]) == choice["text"]
        ids = ids_of(told["tokens"])
        assert ids[:length] == prompt
        expected = reference(ids)
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        for at in range(1, len(ids)):
            row = expected[at - 1]
            assert told["token_logprobs"][at] == pytest.approx(float(row[ids[at]]), abs=2e-5)
            top = dict(zip(ids_of(told["top_logprobs"][at]), told["top_logprobs"][at].values(), strict=True))
            likeliest = {*row.topk(4).indices.tolist(), ids[at]}
            assert top == pytest.approx({token: float(row[token]) for token in likeliest}, abs=2e-5)
            assert choice["text"][told["text_offset"][at] :].startswith(told["tokens"][at])
        if max_tokens:
            assert ids[length:] == expected[length - 1 : -1].argmax(-1).tolist()

    def test_are_before_temperature(self, http, reference, ids_of):
        body = {"model": "dense", "prompt": [9, 10], "max_tokens": 5, "temperature": 3.0, "seed": 1, "logprobs": 0}
        told = post(http, **body)["choices"][0]["logprobs"]
        ids = [9, 10, *ids_of(told["tokens"])]
        expected = [float(row[token]) for row, token in zip(reference(ids)[1:], ids[2:], strict=False)]
        assert told["token_logprobs"] == pytest.approx(expected, abs=2e-5)

    def test_a_stream_tells_the_same(self, http):
        body = {"max_tokens": 8, "seed": 3, "logprobs": 2, "echo": True}
        whole = post(http, **body)["choices"][0]
        pieces = [piece["choices"][0] for piece in stream(http, **body)]
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        for key, values in whole["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][key]] == values


def test_echo_alone(http, alone):
    choice = post(http, max_tokens=4, temperature=0, echo=True)["choices"][0]
    assert choice["text"] == PROMPT + text_of(alone("sparse", PROMPT, 4))


def test_a_shared_prefix_does_not_run_again(http, alone, words):
    prefix = words(300, seed=11)
    for last in ("w50", "w51"):
        prompt = f"{prefix} {last}"
        answer = post(http, prompt=prompt, max_tokens=10, temperature=0)
        assert answer["choices"][0]["text"] == text_of(alone("sparse", prompt, 10))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 256
