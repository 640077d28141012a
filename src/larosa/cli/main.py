"""Entry point of the `larosa` command."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from larosa.cli.bench import bench
from larosa.cli.chat import chat
from larosa.cli.convert import convert
from larosa.cli.demo import demo
from larosa.cli.evaluate import evaluate
from larosa.cli.generate import generate
from larosa.cli.inspect import inspect
from larosa.cli.recover import recover
from larosa.cli.reproduce import reproduce
from larosa.cli.serve import serve
from larosa.cli.together import check_alone, together
from larosa.errors import LarosaError
from larosa.parallel import started
from larosa.version import __version__

_INTERRUPTED = 130
#: What several ranks can do together; of `bench`, `decode`.
_TOGETHER = ("generate", "eval", "serve", "bench")

app = typer.Typer(
    help="Training-free activation sparsity for LLM inference (LaRoSA).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(convert)
app.command("eval")(evaluate)
app.command()(recover)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(inspect)
app.command()(demo)
app.command()(reproduce)
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        print(f"larosa {__version__}")
        raise typer.Exit


@app.callback()
def larosa(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Training-free activation sparsity for LLM inference (LaRoSA)."""
    if context.invoked_subcommand not in _TOGETHER:
        check_alone(str(context.invoked_subcommand))


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit status 1."""
    with together():
        _run()


def _run() -> None:
    try:
        _prepare()
        app(standalone_mode=True)
    except LarosaError as error:
        print(f"larosa: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # typer looks for it within commands alone, not while it makes them
        print("Aborted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _prepare() -> None:
    # What a terminal cannot show is escaped: it is no reason to lose the results of the work.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    # What is no text where text is read is refused by name.
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    # As an interrupt does, so that what is half-written is removed.
    if threading.current_thread() is threading.main_thread() and started() == 1:
        signal.signal(signal.SIGTERM, _end)
    # Before what PyTorch does then: callbacks run in the opposite order of their registration.
    atexit.unregister(_end_at_once)
    atexit.register(_end_at_once)


def _end_at_once() -> None:
    """Once the interpreter exits, an interrupt ends the process: an exception could go nowhere any more."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
