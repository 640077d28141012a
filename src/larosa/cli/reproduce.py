"""`larosa reproduce`: the paper's tables and figures on a model of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from larosa.cli import options
from larosa.cli.options import console
from larosa.decoding import CacheDtype
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import Protocol
from larosa.reproduce import ALL, EXPERIMENTS, ReproduceSettings
from larosa.reproduce import reproduce as run_reproduction
from larosa.reproduce.settings import LENGTHS

_NAMES = [*EXPERIMENTS, ALL]


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help=f"What to reproduce: {', '.join(_NAMES)}; see --list.")
    ] = None,
    model: Annotated[str | None, typer.Argument(help="Folder or Hugging Face name of a dense model.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the results; may exist.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Show the names with a line each and exit.")] = False,
    data: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="Scored: bundled, wikitext2, c4, or a .txt/.json/.jsonl file or folder."),
    ] = "bundled",
    calibration: Annotated[
        str, typer.Option(metavar="SOURCE", help="self, wikitext2, alpaca, c4, or a .txt/.json/.jsonl file or folder.")
    ] = "self",
    other_calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE", help="Another calibration source to compare (table7, table8, figure3); repeatable."
        ),
    ] = None,
    num_sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
    sequence_length: options.SequenceLength = None,
    max_sequences: Annotated[int, typer.Option(help="Evaluate only the first so many sequences.")] = 128,
    protocol: Annotated[
        Protocol, typer.Option(help="Evaluate every position, or the second half behind a dense first half.")
    ] = Protocol.ALL,
    search_sequences: Annotated[int, typer.Option(help="Calibration sequences that score a grid search.")] = 4,
    task_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of task files for table1, accuracy (both else download) and table4."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items of each task for these, and a twentieth of it per MMLU subject.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Answers to each problem of table4.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Cut answers of table4 off after so many tokens.")] = 32768,
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens to decode for figure4; table3 takes the first.")
    ] = ",".join(map(str, LENGTHS)),
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What benchmarks/llamacpp/quality.py measured, to stand beside frontier."),
    ] = None,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Measure the paper's tables and figures on a model; a stopped run goes on where it was."""
    if names:
        console.print(_list())
        return
    if name is None or model is None or out is None:
        raise LarosaError("give a NAME (see --list), a MODEL and --out DIR")
    options.check_json_file(json)
    settings = ReproduceSettings(
        data=data,
        calibration=calibration,
        other_calibration=tuple(other_calibration or ()),
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        max_sequences=max_sequences,
        protocol=protocol,
        search_sequences=search_sequences,
        task_data=task_data,
        limit=limit,
        samples=samples,
        max_new_tokens=max_new_tokens,
        lengths=options.numbers("--lengths", lengths, int, "numbers of tokens separated by commas, 128,2048"),
        kv_cache_dtype=kv_cache_dtype,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        llama_cpp=llama_cpp,
    )
    result = run_reproduction(name, model, out, settings)
    for file in result.files:
        console.print(str(file), markup=False, highlight=False, soft_wrap=True)
    options.write_json(json, result.to_dict())


def _list() -> Table:
    table = Table(show_header=False, box=None)
    for name, experiment in EXPERIMENTS.items():
        table.add_row(name, experiment.title)
    table.add_row(ALL, "All of these in one report, index.html")
    return table
