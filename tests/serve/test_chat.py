from __future__ import annotations

import copy
import json

import pytest

from larosa.checkpoints.io import LoadedModel
from larosa.decoding.sampling import Sampling
from larosa.serve import ServedModel, open_llm
from larosa.serve.chat import Chat
from larosa.serve.completions import Completion
from larosa.serve.reasoning import ReasoningSplitter
from larosa.serve.schema import ChatRequest, CompletionRequest

MESSAGES = [
    {"role": "system", "content": "w5 w6"},
    {"role": "user", "content": [{"type": "text", "text": "w7 "}, {"type": "text", "text": "w8"}]},
]
#: What the template makes of them.
PROMPT = "<s> w5 w6 </s> <s> w7 w8 </s> <s>"
TOOL = {"type": "function", "function": {"name": "w40", "parameters": {"type": "object"}}}


def post(http, status=200, **body):
    response = http.post("/v1/chat/completions", json={"model": "sparse", "messages": MESSAGES, **body})
    assert response.status_code == status, response.text
    return response.json()


def text_of(events):
    return "".join(event.text for event in events)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_message_continues_the_template(http, alone, limit):
    answer = post(http, **{limit: 12}, temperature=0)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text_of(alone("sparse", PROMPT, 12))}
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(PROMPT.split())


def test_without_a_limit_it_goes_on_to_the_end(http, alone):
    events = alone("sparse", PROMPT, 512 - len(PROMPT.split()), Sampling(1.0, seed=1))
    answer = post(http, seed=1)
    assert answer["choices"][0]["message"]["content"] == text_of(events)
    assert answer["choices"][0]["finish_reason"] == events[-1].finish_reason


def test_tools_reach_the_template(http, alone):
    with_tools = text_of(alone("sparse", f"w40 {PROMPT}", 8))
    assert post(http, max_tokens=8, temperature=0, tools=[TOOL])["choices"][0]["message"]["content"] == with_tools
    without = text_of(alone("sparse", PROMPT, 8))
    for more in ({"tools": [TOOL], "tool_choice": "none"}, {"tools": []}):
        assert post(http, max_tokens=8, temperature=0, **more)["choices"][0]["message"]["content"] == without
    assert with_tools != without


@pytest.fixture
def quiet(loaded):
    """A served model whose own settings end no text."""
    model = copy.deepcopy(loaded["sparse"].model)
    model.generation_config.eos_token_id = None
    served = ServedModel("quiet", open_llm(LoadedModel(model, loaded["sparse"].tokenizer), max_length=64))
    yield served
    served.scheduler.close()


def test_the_end_of_a_turn_ends_an_answer(quiet, tokenizer):
    body = {"model": "quiet", "messages": [{"role": "user", "content": "w9"}]}
    assert Chat(quiet, ChatRequest(**body)).requests[0].ends == {2}
    assert Chat(quiet, ChatRequest(**body, stop=["<unk>", "x"])).requests[0].ends == {2, 3}  # which no text shows
    assert Completion(quiet, CompletionRequest(model="quiet", prompt="w9")).requests[0].ends == frozenset()


def test_what_a_request_leaves_out_is_the_checkpoints(quiet):
    def sampling(**asked):
        body = CompletionRequest(model="quiet", prompt="w9", seed=5, **asked)
        return Completion(quiet, body).requests[0].sampling

    assert sampling() == Sampling(1.0, seed=5)
    assert sampling(temperature=0, top_k=-1) == Sampling(seed=5)
    quiet.llm.generation_config.update(do_sample=True, temperature=0.3, top_p=0.8, stop_strings=["w7"])
    assert sampling() == Sampling(0.3, 50, 0.8, seed=5)
    assert sampling(temperature=2, top_k=7) == Sampling(2.0, 7, 0.8, seed=5)
    body = CompletionRequest(model="quiet", prompt="w9", stop="w8")
    assert Completion(quiet, body).requests[0].stop == ("w8", "w7")


def test_what_the_template_refuses(http):
    error = post(http, 400, messages=[{"role": "tool", "content": "w9", "tool_call_id": "1"}])["error"]
    assert "no call to answer" in error["message"]
    call = {"id": "1", "type": "function", "function": {"name": "w40", "arguments": "{"}}
    error = post(http, 400, messages=[{"role": "assistant", "tool_calls": [call]}])["error"]
    assert "arguments are not JSON" in error["message"]


def test_a_stream_is_the_message_in_pieces(http):
    body = {"max_tokens": 12, "seed": 4, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = post(http, **body)
    content = {"model": "sparse", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=content | body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    *pieces, last = map(json.loads, lines[:-1])
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in own) == choice["message"]["content"]
        rows = [row for piece in own if piece["logprobs"] for row in piece["logprobs"]["content"]]
        assert rows == choice["logprobs"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_log_probabilities(http, alone):
    choice = post(http, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3)["choices"][0]
    events = alone("sparse", PROMPT, 6, logprobs=3)
    assert "".join(row["token"] for row in choice["logprobs"]["content"]) == choice["message"]["content"]
    for row, event in zip(choice["logprobs"]["content"], events, strict=True):
        assert row["logprob"] == pytest.approx(event.logprob.logprob)
        assert row["logprob"] == row["top_logprobs"][0]["logprob"]  # the likeliest was drawn
        assert len(row["top_logprobs"]) == 3
        assert bytes(row["bytes"]).decode() == row["token"]


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "w1 w2", "", "w1 w2"),
        ("", "<think>\na b\n</think>\n\nc d", "a b\n", "c d"),
        ("", "\n<think>a</think>b", "a", "b"),
        ("x <think>\n", "a b</think>\nc", "a b", "c"),
        ("", "<think>a b", "a b", ""),
        ("", "<thin ice", "", "<thin ice"),
        ("", "  <", "", "  <"),
        ("", "a <think>b</think>", "", "a <think>b</think>"),
        ("", "<think>a</think>b</think>c", "a", "b</think>c"),
        ("", "<think>a</th", "a</th", ""),
        ("", "", "", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_thoughts_are_told_from_the_answer(prompt, text, reasoning, content, size):
    splitter = ReasoningSplitter(prompt)
    pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
    parts = [splitter.put(piece, last=piece_at == len(pieces) - 1) for piece_at, piece in enumerate(pieces)]
    assert "".join(part.reasoning for part in parts) == reasoning
    assert "".join(part.content for part in parts) == content
