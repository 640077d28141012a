"""A conversion that is ended at any moment leaves nothing behind but the search log, from which the next goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import larosa
from larosa.cli.main import main

from .conftest import QUICK

#: By hand: LAROSA_KILLS=200.
MOMENTS = int(os.environ.get("LAROSA_KILLS", "3"))
_START = "import sys, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from larosa.cli.main import main; "
_READY = "print('ready', flush=True); signal.signal(signal.SIGINT, signal.default_int_handler); main()"


def test_an_interrupt_before_the_command_has_begun(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.main.get_command", interrupted)  # where typer makes commands of functions
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Aborted.\n"


@pytest.mark.slow
def test_an_interrupt_when_all_is_done():
    """While the interpreter exits, where PyTorch still takes things down."""
    late = "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); "
    command = late + "from larosa.cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", command, "--version"], capture_output=True, check=False)
    assert result.stdout.startswith(b"larosa ")
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")


@pytest.mark.slow
@pytest.mark.parametrize("search", ["grid", "none"])
def test_random_moments(checkpoint, tmp_path, text_file, search):
    chance = random.Random(search)
    output, log = tmp_path / "out", tmp_path / "out.search.jsonl"
    command = ("convert", checkpoint, output, *QUICK, "--search", search, "--calibration", text_file, "--no-measure")

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", _START + _READY, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout.readline() == b"ready\n"
        return process

    def remove():
        for file in output.glob("*"):
            file.unlink()
        if output.exists():
            output.rmdir()

    begun = time.monotonic()
    process = start()
    assert process.wait() == 0
    process.communicate()
    whole = time.monotonic() - begun
    remove()
    for _ in range(MOMENTS):
        process = start()
        time.sleep(chance.uniform(0, whole / 2))
        number = chance.choice((signal.SIGINT, signal.SIGTERM))
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        left = {path.name for path in tmp_path.iterdir()} - {"dense"}
        assert left <= {"out.search.jsonl", "out"}, (left, number, err)
        assert b"Traceback" not in err, err
        if "out" in left:  # it was complete by then
            larosa.load(str(output))
            remove()
        else:
            assert process.returncode != 0
        if chance.random() < 0.3:
            log.unlink(missing_ok=True)
