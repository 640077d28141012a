"""Clients side by side: nobody's answer changes, whoever else comes, waits, leaves or fails."""

from __future__ import annotations

import copy
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from larosa.decoding.sampling import Sampling
from larosa.serve import Limits, ServedModel, open_llm

from .conftest import KEY, LENGTH, WAITING, serve


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def idle(served):
    return all(scheduler.running == scheduler.waiting == 0 for scheduler in served.schedulers.values())


def text_of(events):
    return "".join(event.text for event in events)


def test_the_official_client(served, alone):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["dense", "sparse"]
    expected = text_of(alone("sparse", "w9 w10", 12, Sampling(1.0, seed=3)))
    options = {"model": "sparse", "prompt": "w9 w10", "max_tokens": 12, "seed": 3}
    assert client.completions.create(**options).choices[0].text == expected
    assert "".join(piece.choices[0].text for piece in client.completions.create(**options, stream=True)) == expected
    chat = {"model": "dense", "messages": [{"role": "user", "content": "w9"}], "max_completion_tokens": 9, "seed": 1}
    answer = client.chat.completions.create(**chat)
    pieces = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == answer.choices[0].message.content
    assert pieces[-1].usage == answer.usage
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="w9")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**options | {"temperature": -1})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_8_clients_get_what_each_gets_alone(served, http, alone, words):
    prefix = words(150, seed=1)

    def client(number):
        chance, done = random.Random(number), 0
        for _ in range(5):
            model, seed = chance.choice(["dense", "sparse"]), chance.randrange(2)
            start = prefix if chance.random() < 0.4 else ""
            prompt = f"{start} {words(chance.randrange(1, 40), seed=chance.randrange(5))}".strip()
            tokens = chance.randrange(1, 60)
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "seed": seed}
            what = chance.randrange(5)
            if what == 0:
                assert http.post("/v1/completions", json=body | {"top_p": 7}).status_code == 400
            elif what == 1:  # leaves in the middle
                with http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 300}) as stream:
                    next(stream.iter_lines())
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200
            expected = text_of(alone(model, prompt, tokens, Sampling(1.0, seed=seed)))
            assert answer.json()["choices"][0]["text"] == expected
            done += 1
        return done

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(client, range(8))) == [5] * 8
    wait_until(lambda: idle(served))


def connect(served, body):
    """A request sent by hand, whose answer nobody reads."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_leaves_is_forgotten(served, stream):
    scheduler = served.schedulers["sparse"]
    before = scheduler.counts.finished["cancelled"]
    body = f'{{"model": "sparse", "prompt": "w9", "max_tokens": {LENGTH - 1}, "seed": 1, "stream": {stream}, "n": 3}}'
    connection = connect(served, body)
    wait_until(lambda: scheduler.running == 3)
    connection.close()
    wait_until(lambda: idle(served))
    assert scheduler.counts.finished["cancelled"] > before


def test_a_client_that_hangs_in_its_body_holds_nothing_up(served, http, monkeypatch):
    monkeypatch.setattr("larosa.serve.body._BODY_SECONDS", 0.5)
    body = '{"model": "sparse", "prompt": "w9"'
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
        )
        connection.sendall(f"{head}\r\nContent-Length: 1000\r\n\r\n{body}".encode())
        assert http.post("/v1/completions", json={"model": "sparse", "prompt": "w9"}).status_code == 200
        connection.settimeout(60)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_more_than_may_wait_are_refused(served, http):
    body = {"model": "sparse", "prompt": ["w9"] * 8, "n": 4, "max_tokens": 5}  # 32, and 4 + 24 fit
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert response.headers["retry-after"] == "1"
    fits = body | {"prompt": ["w9"] * ((4 + WAITING) // 4)}
    assert len(http.post("/v1/completions", json=fits).json()["choices"]) == 4 + WAITING


@pytest.fixture
def other(loaded):
    """other(**options): a server of its own over the sparse model."""

    def make(limits=None, **options):
        model = ServedModel("sparse", open_llm(copy.deepcopy(loaded["sparse"]), max_length=LENGTH), **options)
        return serve(model, limits=limits), model.scheduler

    return make


def test_a_request_that_takes_too_long(other):
    server, scheduler = other(Limits(seconds=0.2), max_sequences=1)
    body = {"model": "sparse", "prompt": "w9 " * 8, "max_tokens": 400, "seed": 1, "n": 8}
    with server as url, httpx.Client(base_url=url, timeout=60, verify=False) as client:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert '"code": "timeout"' in lines[-1]
        short = client.post("/v1/completions", json=body | {"max_tokens": 1, "n": 1})
        assert short.status_code == 200
    assert scheduler.counts.finished["timeout"] >= 2


def test_logits_that_are_not_finite_are_one_requests_error(other, loaded):
    server, scheduler = other()
    embedding = scheduler.llm.weights.embedding
    embedding[77] = float("nan")
    with server as url, httpx.Client(base_url=url, timeout=60, verify=False) as client:
        body = {"model": "sparse", "max_tokens": 3, "temperature": 0}
        response = client.post("/v1/completions", json=body | {"prompt": "w9 w77"})
        assert response.status_code == 500
        assert "NaN or Inf" in response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "server_error"
        assert client.post("/v1/completions", json=body | {"prompt": "w9"}).status_code == 200


def test_a_server_that_is_told_to_end_finishes_its_answers(other, alone):
    server, scheduler = other()
    expected = text_of(alone("sparse", "w9", 300, Sampling(1.0, seed=1)))
    with ThreadPoolExecutor(1) as pool:
        with server as url:
            body = {"model": "sparse", "prompt": "w9", "max_tokens": 300, "seed": 1}
            answer = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60, verify=False)
            wait_until(lambda: scheduler.running)
        assert answer.result().json()["choices"][0]["text"] == expected
    assert not scheduler.alive
    with suppress(httpx.ConnectError):
        httpx.get(f"{url}/health", verify=False)
        pytest.fail("nobody listens any more")


def test_metrics(served, http):
    def samples():
        lines = http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = samples()
    http.post("/v1/completions", json={"model": "dense", "prompt": "w9 w10 w11", "max_tokens": 4, "temperature": 0})
    http.post("/v1/completions", json={"model": "dense"})
    http.get("/made/up")
    after = samples()
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    path = 'larosa_http_responses_total{path="/v1/completions",status='
    assert changed[f'{path}"200"}}'] == changed[f'{path}"400"}}'] == 1
    assert changed['larosa_http_responses_total{path="other",status="404"}'] == 1
    assert changed['larosa_prompt_tokens_total{model="dense"}'] == 3
    assert changed['larosa_generated_tokens_total{model="dense"}'] == 4
    assert changed["larosa_first_token_seconds_count"] == changed["larosa_request_seconds_count"] == 1
    assert after['larosa_first_token_seconds_bucket{le="+Inf"}'] == after["larosa_first_token_seconds_count"]
    assert 'sequences_running{model="sparse"}' in http.get("/metrics").text
