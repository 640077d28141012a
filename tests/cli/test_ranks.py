"""Commands that torchrun starts, as a user does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
import torch

import larosa
from larosa.benchmarks.decode import DENSE, DENSE_LOW_BIT, LAROSA
from larosa.cli import together
from larosa.decoding import Sampling
from larosa.runtime import LLM, Request


@contextmanager
def ranks_of(size, *arguments):
    """A command on so many ranks, as torchrun's process."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", size, "-m", "larosa", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
                each.kill()


def torchrun(size, *arguments):
    """Run a command on so many ranks; what it wrote."""
    with ranks_of(size, *arguments) as process:
        out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.mark.slow
def test_two_ranks_write_what_one_process_does(cli, converted, tmp_path):
    options = ("generate", converted, "--prompt", "w5 w9 w7", "--max-new-tokens", 12, "--temperature", 0.8)
    alone = cli(*options, "--dtype", "float32")
    code, out, err = torchrun(2, *options, "--dtype", "float32", "--json", tmp_path / "g.json")
    assert code == 0, err
    assert out == alone.out
    assert err.count("tokens/s") == 1
    assert json.loads((tmp_path / "g.json").read_text("utf-8"))["tokens"] == 12


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_two_gpus_write_what_one_does(cli, converted):
    """All of a token in one graph, with what the ranks tell each other."""
    options = ("generate", converted, "--prompt", "w5 w9 w7", "--max-new-tokens", 40, "--dtype", "float32")
    alone = cli(*options, "--device", "cuda:0")
    code, out, err = torchrun(2, *options)
    assert code == 0, err
    assert out == alone.out


@contextmanager
def server_of(size, model, *options):
    """torchrun's process of a server on so many ranks, the processes of the ranks in order, and a client of it."""
    httpx = pytest.importorskip("httpx")
    with ranks_of(size, "serve", model, "--port", 0, "--dtype", "float32", *options) as process:
        lines = []
        while not lines or not lines[-1].startswith("Serving"):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: int(rank.environ()["RANK"]))
        with httpx.Client(base_url=lines[-1].split()[-1], timeout=120, verify=False) as client:
            yield process, ranks, client


def check_served(folder, client, device):
    """Requests side by side, some of which begin alike, get what one process gives alone; one client leaves."""
    llm = LLM(*larosa.load(str(folder), dtype="float32", device=device))

    def alone(body):
        request = Request(
            llm.encode(body["prompt"]), body["max_tokens"], Sampling(body["temperature"], seed=body["seed"])
        )
        return "".join(event.text for event in llm.stream(request))

    texts = [f"w5 w9 w{number}" for number in range(7, 13)]
    bodies = [
        {"model": folder.name, "prompt": text, "max_tokens": 20, "seed": seed, "temperature": seed % 2}
        for seed, text in enumerate([*texts, texts[0]])
    ]
    with client.stream("POST", "/v1/completions", json=bodies[0] | {"stream": True, "max_tokens": 90}) as left:
        next(left.iter_lines())
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: client.post("/v1/completions", json=body).json(), bodies))
    assert [answer["choices"][0]["text"] for answer in answers] == [alone(body) for body in bodies]


@pytest.mark.slow
def test_two_ranks_serve_what_one_process_does_until_told_to_end(converted):
    with server_of(2, converted, "--max-num-seqs", 3) as (process, ranks, client):
        check_served(converted, client, "cpu")
        process.send_signal(signal.SIGTERM)
        assert not psutil.wait_procs(ranks, timeout=60)[1]
        assert "larosa" not in process.communicate(timeout=60)[1]  # what torchrun says aside, nothing


@pytest.mark.slow
def test_a_server_that_loses_a_rank_ends(converted):
    with server_of(2, converted) as (process, ranks, _):
        ranks[1].kill()
        assert process.wait(60) == 1
        assert not psutil.wait_procs(ranks, timeout=60)[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (("--top-k-over", "own"), [DENSE, LAROSA]),
        (("--weights", "int8", "--selection", "threshold"), [DENSE, DENSE_LOW_BIT, f"{LAROSA}, thresholds"]),
        (("--weights", "int4", "--no-dense"), [DENSE_LOW_BIT, LAROSA]),
    ],
)
def test_a_shape_on_two_gpus(tmp_path, options, rows):
    shape = ("--shape", "llama-3.2-1b", "--layers", 2, "--vocab-size", 4096, "--sparsity", 0.5)
    code, _, err = torchrun(2, "bench", "decode", *shape, *options, "--json", tmp_path / "d.json")
    assert code == 0, err
    found = json.loads((tmp_path / "d.json").read_text("utf-8"))["rows"]
    assert [row["row"] for row in found] == rows
    assert all("2 ranks" in row["shape"] and row["ms_per_token"] > 0 for row in found)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_two_gpus_serve_what_one_does(converted):
    """Steps of several texts are graphs, which both ranks replay as the first of them says."""
    with server_of(2, converted, "--max-num-seqs", 3) as (process, ranks, client):
        check_served(converted, client, "cuda:0")
        process.send_signal(signal.SIGTERM)
        assert not psutil.wait_procs(ranks, timeout=60)[1]


@pytest.mark.slow
def test_ranks_that_cannot_share_a_model_say_so_once(checkpoint):
    code, _, err = torchrun(3, "eval", checkpoint)
    assert code != 0
    assert err.count("larosa: error: 3 ranks cannot share 2 key-value heads evenly: start 1, 2 of them\n") == 1


@pytest.fixture
def started(monkeypatch):
    """As if torchrun had started this process as the first of two."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, str(value))
    # Instead of the process, which the tests run in.
    monkeypatch.setattr(together, "_end", sys.exit)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("command", [("convert", "x", "y"), ("chat", "x"), ("bench", "kernels")])
def test_what_one_process_does_is_refused(started, refused, command):
    name = " ".join(part for part in command if part not in "xy")
    assert refused(*command) == f"larosa {name} runs in one process: leave torchrun out"


@pytest.mark.parametrize("option", [("--lossless",), ("--draft", "int8"), ("--reference", "y")])
def test_what_a_server_on_ranks_does_without(started, refused, option):
    assert refused("serve", "x", *option) == f"larosa serve {option[0]} runs in one process: leave torchrun out"


def test_a_device_for_each_rank(started, refused, checkpoint):
    assert "each of 2 ranks has a device of its own" in refused("generate", checkpoint, "--device", "cuda:1")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are enough")
def test_too_few_gpus(started, refused, checkpoint):
    assert "2 ranks need a GPU each" in refused("eval", checkpoint, "--device", "cuda")


def test_a_choice_of_ranks_without_any_is_refused(refused, checkpoint):
    assert "--top-k-over is for several ranks" in refused("generate", checkpoint, "--top-k-over", "own")
