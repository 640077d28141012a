"""Options that mean the same in every command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from larosa.benchmarks.results import DecodeRow
from larosa.checkpoints.io import load
from larosa.decoding import CacheDtype, EngineName, Generation
from larosa.decoding.lossless import RoundedDraft
from larosa.decoding.sampling import unused_settings
from larosa.errors import LarosaError
from larosa.parallel import Over, this_rank
from larosa.sparsity.report import Sparsity
from larosa.utils.progress import stderr

#: Names, paths and text are printed as they are: what looks like markup in them is none.
console = Console(markup=False, emoji=False, highlight=False)
_WIDEST_TABLE = 140

NumberT = TypeVar("NumberT", int, float)


class Dtype(StrEnum):
    """Number formats a model can be loaded in."""

    AUTO = "auto"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


Model = Annotated[str, typer.Argument(help="Folder, GGUF file or Hugging Face name of a dense or converted model.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Number format; auto: the checkpoint's own, bfloat16 for GGUF.")
]
KvCacheDtype = Annotated[
    CacheDtype,
    typer.Option("--kv-cache-dtype", help="How larosa's engine keeps keys and values; auto is as the weights."),
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="The text of the model with nothing skipped, some tokens of it drafted.")
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="int8|int4|MODEL",
        help="What drafts for --lossless: the weights rounded to 8 or 4 bits, or a conversion of the same model; by "
        "default what skips, if anything does. The text itself always does.",
    ),
]
EngineOption = Annotated[
    EngineName | None,
    typer.Option("--engine", help="What runs the model; larosa's own engine where the device has kernels for it."),
]
#: Of these None is what the checkpoint's generation_config.json says.
Temperature = Annotated[
    float | None,
    typer.Option(help="0 is greedy. Default: as generation_config.json, like the other options of sampling; else 0."),
]
TopK = Annotated[int | None, typer.Option(help="Sample from so many of the likeliest tokens; 0: from all.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the smallest set of tokens this probable.")]
MinP = Annotated[float | None, typer.Option(help="Sample from tokens this times as probable as the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: make tokens of the text so far less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
TopKOver = Annotated[
    Over | None,
    typer.Option(
        help="Under torchrun: the ranks keep the largest entries of h2 and h4 of all (default), or each of its own."
    ),
]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code in the checkpoint to run; never needed by larosa.")
]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in each sequence.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")]


def decode_title(row: DecodeRow) -> str:
    """What the rows of a table of decoding share; `row` is the engine's."""
    cache = f", {row.kv_cache_dtype} keys and values in the engine" if row.kv_cache_dtype != row.dtype else ""
    return f"{row.shape}, {row.dtype}{cache}"


def print_whole(table: Table) -> None:
    """Print a table as wide as it is: in a narrower terminal lines wrap, where rich would cut cells to nothing."""
    width = max(console.width, _WIDEST_TABLE)
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def write_text(text: str) -> None:
    """Write a model's text to standard output, untouched: rich would expand tabs and drop carriage returns."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_file(path: Path, option: str) -> str:
    """The text of a file that an option names."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise LarosaError(f"{path}: not UTF-8 text, byte {error.start} ({option})") from None
    except OSError as error:
        raise LarosaError(f"{path}: {error.strerror} ({option})") from None


def drafter(draft: str | None, lossless: bool, dtype: Dtype, device: str, trust_remote_code: bool) -> Any:
    """What `--draft` names, as `larosa.generate` takes it: a model is loaded."""
    if draft is None or not lossless or draft in tuple(RoundedDraft):
        return draft  # who generates refuses it without --lossless
    return load(draft, dtype=dtype, device=device, trust_remote_code=trust_remote_code).model


def tell_speed(result: Generation) -> None:
    """How many tokens came, how fast and by what, on standard error."""
    speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s"
    stderr.print(f"{result.tokens} tokens{speed}, {result.engine} engine", highlight=False)
    if (found := result.lossless) is not None:
        stderr.print(
            f"lossless: {found['tokens_per_pass'] or 1:.2f} tokens of a dense pass, "
            f"{found['accepted']} of {found['drafted']} drafted ones accepted",
            highlight=False,
        )


def note_unused_settings(model: Any) -> None:
    """Say on standard error what of the checkpoint's generation settings has no effect here."""
    if unused := unused_settings(model.generation_config):
        stderr.print(f"Not used of generation_config.json: {', '.join(unused)}", highlight=False, soft_wrap=True)


def check_json_file(path: Path | None) -> None:
    """Refuse a result file that cannot be written before the work rather than after it."""
    if path is None or this_rank() > 0:
        return
    try:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise LarosaError(f"{path}: not a file in an existing folder (--json)")
        there = path.exists()
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise LarosaError(f"{path}: {error.strerror} (--json)") from None


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write the results where `--json` asked for them."""
    if path is not None and this_rank() == 0:
        try:
            path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise LarosaError(f"{path}: {error.strerror} (--json)") from None


def numbers(option: str, text: str, kind: Callable[[str], NumberT], form: str) -> tuple[NumberT, ...]:
    """What an option lists, separated by commas; `form` says how, for the message."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise LarosaError(f"{option} '{text}': give {form}") from None


def fractions(sparsity: str) -> tuple[float, ...]:
    """What `--sparsity` lists."""
    return numbers("--sparsity", sparsity, float, "fractions separated by commas, 0.25,0.5")


def sparsity_rows(sparsity: Sparsity) -> list[tuple[str, str]]:
    """The three numbers that every report states, each under its name."""
    return [
        ("nominal sparsity", f"{sparsity.nominal:.1%}"),
        ("weights skipped", f"{sparsity.weights:.1%}"),
        ("  net of adapters", f"{sparsity.weights_net_of_adapters:.1%}"),
    ]


def add_sparsity(table: Table, sparsity: Sparsity) -> None:
    """`sparsity_rows` as rows of a table."""
    for row in sparsity_rows(sparsity):
        table.add_row(*row)


def machine_line(machine: dict[str, str | int], bandwidth: float) -> str:
    """What a benchmark ran on, in one line."""
    if "gpu" in machine:
        return (
            f"{machine['gpu']}, torch {machine['torch']}, {machine['kernels']} kernels; "
            f"reads {bandwidth / 1e12:.2f} TB/s"
        )
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, torch {machine['torch']}; "
        f"reads {bandwidth / 1e9:.1f} GB/s"
    )
