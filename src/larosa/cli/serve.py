"""`larosa serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from larosa.checkpoints.io import load
from larosa.cli import options
from larosa.decoding import CacheDtype
from larosa.errors import LarosaError
from larosa.utils.progress import stderr


def serve(
    model: options.Model,
    reference: Annotated[
        str | None, typer.Option(help="Serve this model too: the dense one, which the page at / shows beside.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LAROSA_API_KEY", help="Key that clients must give; without it any may come.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; without it its folder's name.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a text, prompt included; without it the model's context, up to 8192.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Texts at once.")] = 8,
    max_waiting: Annotated[int, typer.Option(help="Texts that may wait; more are refused.")] = 64,
    max_request_seconds: Annotated[float, typer.Option(min=0, help="Time for a request, waiting included.")] = 600.0,
    max_request_bytes: Annotated[int, typer.Option(min=1, help="Size of a request.")] = 4 << 20,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file with a chat template, in place of the tokenizer's.")
    ] = None,
    lossless: options.Lossless = False,
    draft: options.Draft = None,
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve a model by OpenAI's HTTP interface, and a page to try it at /."""
    if any(find_spec(needed) is None for needed in ("starlette", "uvicorn")):
        raise LarosaError("larosa serve needs the extra: pip install 'larosa[serve]'")
    from larosa.serve import Limits, Server, bind, listen, open_model

    template = None if chat_template is None else options.read_file(chat_template, "--chat-template")
    bound = bind(host, port)
    drafter = options.drafter(draft, lossless, dtype, device, trust_remote_code)
    models = [
        open_model(
            called,
            load(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code),
            max_length=max_model_len,
            kv_cache_dtype=kv_cache_dtype,
            lossless=lossless and number == 0,
            draft=drafter if number == 0 else None,
            template=template,
            max_sequences=max_num_seqs,
            max_waiting=max_waiting,
        )
        for number, (called, path) in enumerate(_named(served_model_name or _name(model), model, reference))
    ]
    app = Server(models, api_key, Limits(max_request_seconds, max_request_bytes)).app()
    names = ", ".join(served.name for served in models)
    listen(app, bound, lambda url: stderr.print(f"Serving {names} at {url}", highlight=False))


def _named(name: str, model: str, reference: str | None) -> list[tuple[str, str]]:
    if reference is None:
        return [(name, model)]
    other = _name(reference)
    return [(name, model), (f"{other}-reference" if other == name else other, reference)]


def _name(model: str) -> str:
    return os.path.basename(os.path.abspath(model))
