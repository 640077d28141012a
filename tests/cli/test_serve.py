"""`larosa serve` as a process of its own."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import pytest

import larosa

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

MAIN = [
    sys.executable,
    "-c",
    "import torch; torch.set_num_threads(1); from larosa.cli.main import main; main()",
    "serve",
]


def test_serves_until_it_is_told_to_end(checkpoint, converted, tmp_path):
    """The dense model beside what a converted one keeps of its weights: all of them, and 8 bits draft."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    options = ["--port", "0", "--api-key", "k", "--served-model-name", "tiny", "--max-model-len", "64"]
    options += ["--lossless", "--draft", "int8"]
    command = [*MAIN, converted, "--reference", checkpoint, *options, "--chat-template", template]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        line = server.stderr.readline()
        url = re.fullmatch(r"Serving tiny, dense at (http://127\.0\.0\.1:\d+)\n", line)[1]
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=60, verify=False) as client:
            cards = client.get("/v1/models").json()["data"]
            assert [(card["id"], card["weights_read"]) for card in cards] == [("tiny", 1), ("dense", 1)]
            model, tokenizer = larosa.load(str(converted), device="cpu")
            expected = larosa.generate(model, tokenizer, "w9 w10", max_new_tokens=30, lossless=True).text
            body = {"model": "tiny", "prompt": "w9 w10", "max_tokens": 30, "temperature": 0}
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
            chat = {
                "model": "dense",
                "messages": [{"role": "user", "content": "w9 w10"}],
                "max_tokens": 8,
                "temperature": 0,
            }
            answer = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
            dense = larosa.load(str(checkpoint), device="cpu")
            assert answer == larosa.generate(*dense, "w9 w10", max_new_tokens=8).text
            assert client.post("/v1/completions", json=body | {"max_tokens": 63}).status_code == 400
            page = client.get("/")
            assert "<title>larosa</title>" in page.text
            assert not re.search(r"(src|href)=|url\(|@import", page.text)  # nothing from elsewhere
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM
        assert server.stderr.read() == ""


def test_an_address_that_is_taken(refused, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # Before the model is loaded.
        assert refused("serve", "nowhere", "--port", port) == f"--host 127.0.0.1 --port {port}: Address already in use"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-num-seqs", 0), "the number of sequences must be at least 1, not 0"),
        (("--max-model-len", 129), "a length of 129 tokens: the model's context is 1 to 128"),
        (("--chat-template", "nowhere.jinja"), "nowhere.jinja: No such file or directory (--chat-template)"),
    ],
)
def test_bad_options(refused, checkpoint, options, message):
    assert refused("serve", checkpoint, *options) == message
