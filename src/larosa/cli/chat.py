"""`larosa chat`: a conversation with a model, at a terminal or from a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from larosa.checkpoints.io import load
from larosa.cli import options
from larosa.data.text import check_text
from larosa.decoding import CacheDtype, Conversation, Sampling
from larosa.errors import LarosaError
from larosa.utils.progress import stderr

_HELP = 'Ctrl-C ends an answer; /clear forgets the conversation; /exit or Ctrl-D ends; """ around several lines'
_QUOTES = '"""'


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="End an answer after so many tokens.")] = 1024,
    stop: options.Stop = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = 0,
    engine: options.EngineOption = None,
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Chat with a model. Ctrl-C ends an answer, /clear forgets the conversation, /exit or Ctrl-D ends.

    A line is a message; one of several lines stands between lines of three double quotes. Only answers go to standard
    output; the prompt and the speed go to standard error where that is no terminal.
    """
    check_text(system or "", "--system")
    loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    sampling = Sampling.of(
        loaded.generation_config,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    talk = Conversation(
        loaded,
        tokenizer,
        system,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        engine=engine,
        kv_cache_dtype=kv_cache_dtype,
    )
    options.note_unused_settings(loaded)
    interactive = sys.stdin.isatty()
    if interactive:
        stderr.print(_HELP, highlight=False, soft_wrap=True)
        with suppress(ImportError):
            import readline  # noqa: F401 - with it, input() edits lines and remembers them
    while True:
        try:
            if not _turn(talk, interactive):
                return
        except KeyboardInterrupt:
            if not interactive:
                raise
            options.write_text("\n")


def _turn(talk: Conversation, interactive: bool) -> bool:
    """Read a message and answer it; whether the conversation goes on."""
    try:
        text = _read_message()
    except EOFError:
        if interactive:
            print(file=sys.stderr)
        return False
    match text.strip():
        case "/exit":
            return False
        case "/clear":
            talk.clear()
        case "":
            pass
        case _:
            try:
                talk.room(text)
            except LarosaError as error:
                if not interactive:
                    raise
                stderr.print(str(error), highlight=False, soft_wrap=True)
                return True
            result = talk.answer(text, options.write_text)
            options.write_text("\n")
            options.tell_speed(result)
    return True


def _read_message() -> str:
    line = _read_line("> ")
    if not line.startswith(_QUOTES):
        return line
    lines = [line.removeprefix(_QUOTES)]
    with suppress(EOFError):
        while not lines[-1].endswith(_QUOTES):
            lines.append(_read_line("... "))
    return "\n".join(lines).removesuffix(_QUOTES).strip("\n")


def _read_line(prompt: str) -> str:
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
