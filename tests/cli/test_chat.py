"""`larosa chat` and `larosa generate --chat`: by standard input, and at a real terminal with Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from contextlib import suppress

import pytest

import larosa
from larosa.data.bundled import bundled_model
from larosa.decoding.chat import conversation

COMMAND = [sys.executable, "-c", "from larosa.cli.main import main; main()"]
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w4', 'user': 'w5', 'assistant': 'w6'}[m.role] }} {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w6{% endif %}"
)


@pytest.fixture
def talker(checkpoint):
    """A dense Llama with a chat template."""
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return checkpoint


@pytest.fixture
def answers(talker):
    """answers(system, *messages): what the model says to each in turn."""
    model, tokenizer = larosa.load(str(talker), device="cpu")

    def ask(system, *messages):
        said, found = [], []
        for message in messages:
            said += [{"role": "user", "content": message}]
            result = larosa.generate(model, tokenizer, conversation(system, *said), max_new_tokens=8)
            said += [{"role": "assistant", "content": result.text}]
            found.append(result.text)
        return found

    return ask


@pytest.fixture
def piped(cli, monkeypatch):
    """piped(text, ...): run a command with some bytes for its standard input."""

    def run(text, *arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        return cli(*arguments)

    return run


def test_a_conversation_through_a_pipe(piped, talker, answers):
    message = b'w10 w11\n\n  \nw12\n/clear\n"""w13\nw14\n"""\n/exit\nw15\n'
    done = piped(message, "chat", talker, "--system", "w9", "--max-new-tokens", 8, "--device", "cpu")
    assert done.code == 0, done.err
    expected = [*answers("w9", "w10 w11", "w12"), *answers("w9", "w13\nw14")]
    assert done.out == "".join(text + "\n" for text in expected)
    assert len(re.findall(r"^\d+ tokens(, [\d.]+ tokens/s)?, larosa engine$", done.err, re.M)) == 3


def test_the_end_of_the_input_ends_the_conversation(piped, talker, answers):
    outcome = piped(b'"""\nw10\nw11', "chat", talker, "--max-new-tokens", 8, "--device", "cpu")
    assert (outcome.code, outcome.out) == (0, answers(None, "w10\nw11")[0] + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"w10 " * 200, "the model's context is 128: /clear begins anew"), (b"w10 \xff\n", "not UTF-8 text")],
)
def test_a_message_that_cannot_be_answered(piped, talker, text, message):
    code, out, err = piped(text, "chat", talker)
    assert (code, out) == (1, "")
    assert err.startswith("larosa: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-k", -1), "top_k must be at least 0"),
        (("--min-p", 1.5), "min_p must be in"),
        (("--repetition-penalty", 0), "repetition_penalty must be above 0"),
        (("--temperature", "nan"), "temperature must be at least 0"),
        (("--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
    ],
)
def test_bad_options(refused, talker, options, message):
    assert message in refused("chat", talker, *options)
    assert message in refused("generate", talker, "--prompt", "w9", *options)


def test_a_model_without_a_template(refused, checkpoint):
    assert "no chat template" in refused("chat", checkpoint)
    assert "no chat template" in refused("generate", checkpoint, "--chat", "--prompt", "w9", "--max-new-tokens", 4)


class TestTerminal:
    """In a pseudo-terminal, with a model whose answers go on for thousands of tokens."""

    @pytest.fixture
    def folder(self, tmp_path):
        shutil.copytree(bundled_model(), tmp_path / "model")
        template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        (tmp_path / "model" / "chat_template.jinja").write_text(template, "utf-8")
        file = tmp_path / "model" / "generation_config.json"
        config = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps({**config, "eos_token_id": None}), "utf-8")
        return tmp_path / "model"

    @pytest.fixture
    def terminal(self, folder):
        pid, file = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts background jobs with it ignored
            os.environ.update(OMP_NUM_THREADS="1", TERM="dumb")
            options = ("--max-new-tokens", "1900", "--temperature", "1", "--engine", "transformers", "--device", "cpu")
            os.execv(COMMAND[0], [*COMMAND, "chat", str(folder), *options])
        terminal = Terminal(pid, file)
        yield terminal
        if not terminal.ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(file)

    def test_ctrl_c_ends_an_answer_and_not_the_program(self, terminal):
        terminal.until("> ")
        for message in ("The river flows", "And the sea"):
            terminal.type(message + "\n", until=re.escape(message))
            terminal.until(".{60}")
            after = terminal.type("\x03", until="\n> ")
            assert "Traceback" not in after
            assert "tokens" not in after.rpartition("^C")[2]  # no speed of an answer that did not end
        terminal.type("half a line", until="half a line")
        terminal.type("\x03", until="\n> ")  # at the prompt it drops what has been typed
        assert terminal.ends_by("\x04") == 0, terminal.shown
        assert "Traceback" not in terminal.shown


class Terminal:
    """The near side of a program's pseudo-terminal.

    A key is pressed again while nothing comes of it: the kernel drops what waits when Ctrl-C arrives, and a line
    editor that is not waiting yet misses the signal.
    """

    PATIENCE = 240.0  # seconds, on a machine that does much else

    def __init__(self, pid, file):
        self.pid, self.file = pid, file
        self.shown = ""
        self.ended = False

    def read(self):
        """Take what is shown within a tenth of a second; False where the other side has closed."""
        if not select.select([self.file], [], [], 0.1)[0]:
            return True
        try:
            text = os.read(self.file, 4096)
        except OSError:  # Linux says so when the other side has closed
            return False
        self.shown += text.decode(errors="replace")
        return bool(text)

    def until(self, pattern, seconds=PATIENCE):
        """Read on until the pattern, and give what came before and with it."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.S)):
            if not self.read() or time.monotonic() > ends:
                raise AssertionError(f"{pattern!r} is not in {self.shown!r}")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, keys, until):
        for _ in range(int(self.PATIENCE / 10) - 1):
            os.write(self.file, keys.encode())
            with suppress(AssertionError):
                return self.until(until, seconds=10)
        return self.until(until, seconds=10)

    def ends_by(self, keys):
        """The exit status of the program, which these keys end."""
        ends = time.monotonic() + self.PATIENCE
        pressed = 0.0
        while time.monotonic() < ends:
            if time.monotonic() > pressed + 10:
                with suppress(OSError):
                    os.write(self.file, keys.encode())
                pressed = time.monotonic()
            self.read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = True
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running after {keys!r}: {self.shown!r}")


class TestGenerate:
    def test_answers_by_the_template(self, cli, talker, answers, tmp_path):
        options = ("--max-new-tokens", 8, "--device", "cpu", "--json", tmp_path / "g.json")
        outcome = cli("generate", talker, "--chat", "--system", "w9", "--prompt", "w10", *options)
        assert outcome.code == 0, outcome.err
        (expected,) = answers("w9", "w10")
        assert outcome.out == expected + "\n"
        report = json.loads((tmp_path / "g.json").read_text("utf-8"))
        assert (report["text"], report["prompt_tokens"]) == (expected, 7)
        assert report["finish_reason"] in ("stop", "length")

    def test_the_prompt_from_a_file_or_standard_input(self, cli, piped, checkpoint, tmp_path):
        options = ("--max-new-tokens", 5, "--device", "cpu")
        expected = cli("generate", checkpoint, "--prompt", "w10 w11\nw12", *options)
        assert expected.code == 0, expected.err
        for end in ("", "\n", "\r\n"):
            (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfw10 w11\nw12" + end.encode())
            assert cli("generate", checkpoint, "--file", tmp_path / "prompt.txt", *options).out == expected.out
        assert piped(b"w10 w11\nw12\n", "generate", checkpoint, "--file", "-", *options).out == expected.out

    def test_stops_before_a_text(self, cli, checkpoint):
        options = ("--prompt", "w10", "--max-new-tokens", 20, "--device", "cpu")
        whole = cli("generate", checkpoint, *options).out
        stop = whole[30:36]
        outcome = cli("generate", checkpoint, *options, "--stop", "never", "--stop", stop)
        assert outcome.out == whole[: whole.index(stop)] + "\n"

    def test_uses_the_checkpoints_settings_and_says_which_it_does_not(self, cli, checkpoint):
        options = ("--prompt", "w10", "--max-new-tokens", 12, "--device", "cpu")
        sampled = cli("generate", checkpoint, *options, "--temperature", 2, "--top-k", 9)
        file = checkpoint / "generation_config.json"
        config = json.loads(file.read_text("utf-8"))
        settings = {"do_sample": True, "temperature": 2.0, "top_k": 9, "num_beams": 4, "no_repeat_ngram_size": 2}
        file.write_text(json.dumps({**config, **settings}), "utf-8")
        outcome = cli("generate", checkpoint, *options)
        assert outcome.out == sampled.out
        assert "Not used of generation_config.json: num_beams, no_repeat_ngram_size\n" in outcome.err
        assert cli("generate", checkpoint, *options, "--temperature", 0).out != sampled.out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--prompt", "w9", "--file", "-"), "--prompt and --file: give one of them"),
            (("--prompt", "w9", "--system", "w9"), "give --chat with it"),
            (("--file", "nowhere.txt"), "nowhere.txt: No such file"),
            (("--file", "."), "Is a directory"),
            (("--prompt", "w9", "--stop", ""), "--stop must not be empty"),
        ],
    )
    def test_refusals(self, refused, talker, options, message):
        assert message in refused("generate", talker, *options)

    def test_a_file_that_is_no_text(self, refused, talker, tmp_path):
        (tmp_path / "prompt.txt").write_bytes(b"w9 \xff")
        assert "prompt.txt: not UTF-8 text (byte 3)" in refused("generate", talker, "--file", tmp_path / "prompt.txt")
