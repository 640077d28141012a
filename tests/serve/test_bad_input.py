"""What clients should not send: each gets its status and OpenAI's shape, and others go on."""

from __future__ import annotations

import json

import httpx
import pytest

from .conftest import LENGTH

GOOD = {"model": "sparse", "prompt": "w9", "max_tokens": 2}
CHAT = {"model": "sparse", "messages": [{"role": "user", "content": "w9"}], "max_tokens": 2}


def check(response, status, about=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == {401: "authentication_error"}.get(status, "invalid_request_error")
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    if about is not None:
        assert about in error["message"]
    return error


@pytest.fixture(autouse=True)
def _others_go_on(http):
    yield
    assert http.post("/v1/completions", json=GOOD).status_code == 200
    assert http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": "x" * 10_000}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [7]}, "stop.0"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"sing": True}}, "stream_options.sing"),
        ({"no_such_thing": 1}, "no_such_thing"),
        ({"model": None}, "model"),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_parameters(http, path, change, param):
    body = (GOOD if path == "completions" else CHAT) | change
    error = check(http.post(f"/v1/{path}", json=body), 400, param)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [5, "w9"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [128]}, "all below 128"),
        ({"prompt": [10**30]}, "all below 128"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["w9"] * 1000}, "prompt"),
        ({"prompt": "w9 \ud800"}, "not UTF-8 text (character 4)"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "w1"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": "\ud800"}, "stop"),
    ],
)
def test_completions(http, change, about):
    check(http.post("/v1/completions", content=json.dumps(GOOD | change), headers=JSON), 400, about)


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "w9"}, "messages"),
        ({"messages": [{"role": "poet", "content": "w9"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not UTF-8"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"max_completion_tokens": 3}, "give one of them"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"tokenize": True}}, "must not have 'tokenize'"),
        ({"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, "must not have 'chat_template'"),
        ({"chat_template_kwargs": {"self": 1}}, "chat template"),
    ],
)
def test_chats(http, change, about):
    check(http.post("/v1/chat/completions", content=json.dumps(CHAT | change), headers=JSON), 400, about)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_unknown_model(http, path):
    error = check(http.post(f"/v1/{path}", json=(CHAT if "chat" in path else GOOD) | {"model": "gpt-5"}), 404, "gpt-5")
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    check(http.get("/v1/models/gpt-5"), 404, "dense, sparse")


@pytest.mark.parametrize(("length", "max_tokens"), [(LENGTH + 1, None), (LENGTH, 1), (10, LENGTH), (10, 10**30)])
@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_context(http, words, length, max_tokens, stream):
    body = GOOD | {"prompt": words(length), "max_tokens": max_tokens, "stream": stream}
    error = check(http.post("/v1/completions", json=body), 400, f"maximum context length is {LENGTH} tokens")
    assert error["code"] == "context_length_exceeded"


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"model": "sparse", "prompt": "w9"} more', "JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"model": "sparse", "prompt": "\xff"}', "not UTF-8 (byte 31)"),
        (b'{"model": "sparse", "prompt": "w9", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"model": "sparse", "prompt": "w9", "top_p": -Infinity}', "-Infinity is no JSON number"),
        (b'{"model": "sparse", "prompt": "w9", "temperature": 1e999}', "temperature"),
        (b"[" * 50_000, "JSON"),
        (b'{"seed": ' + b"9" * 50_000 + b"}", "JSON"),
    ],
)
def test_bodies(http, content, about):
    check(http.post("/v1/completions", content=content, headers=JSON), 400, about)


def test_a_large_body(http):
    check(http.post("/v1/completions", json=GOOD | {"prompt": "w9 " * 50_000}), 413, "100000 bytes")

    def endless():
        for _ in range(1000):
            yield b" " * 1000

    check(http.post("/v1/completions", content=endless(), headers=JSON), 413, "100000 bytes")


def test_another_type(http):
    # What a form on another site's page can send.
    check(http.post("/v1/completions", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}), 415)


def test_paths_and_methods(http):
    check(http.get("/v1/nothing"), 404)
    check(http.get("/v1/completions"), 405)


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer", "the key", "Bearer the key x", "Bearer \xe9"])
def test_the_key(served, key):
    headers = {} if key is None else {"Authorization": key.encode("latin-1")}
    for path in ("/v1/models", "/v1/completions", "/v1/nothing", "/v1"):
        check(httpx.get(served.url + path, headers=headers, verify=False), 401, "API key")
    for path in ("/", "/health", "/metrics"):
        assert httpx.get(served.url + path, verify=False).status_code == 200
