"""Commands that torchrun starts, as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from larosa.cli import together


def torchrun(size, *arguments):
    """Run a command on so many ranks; what it wrote."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", size, "-m", "larosa", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
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


@pytest.mark.parametrize("command", [("convert", "x", "y"), ("serve", "x"), ("bench", "kernels")])
def test_what_one_process_does_is_refused(started, refused, command):
    name = " ".join(part for part in command if part not in "xy")
    assert refused(*command) == f"larosa {name} runs in one process: leave torchrun out"


def test_a_device_for_each_rank(started, refused, checkpoint):
    assert "each of 2 ranks has a device of its own" in refused("generate", checkpoint, "--device", "cuda:1")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are enough")
def test_too_few_gpus(started, refused, checkpoint):
    assert "2 ranks need a GPU each" in refused("eval", checkpoint, "--device", "cuda")


def test_a_choice_of_ranks_without_any_is_refused(refused, checkpoint):
    assert "--top-k-over is for several ranks" in refused("generate", checkpoint, "--top-k-over", "own")
