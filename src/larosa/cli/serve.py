"""`larosa serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from larosa.cli import options
from larosa.cli.together import check_alone, give_up, load_model, ranks_of, until_told
from larosa.decoding import CacheDtype
from larosa.errors import LarosaError
from larosa.parallel import Lead, this_rank
from larosa.runtime import LLM, follow
from larosa.utils.progress import stderr

#: Seconds that requests have to end in on ranks, which torchrun kills 30 s after it has told them to end.
_GRACE_SECONDS = 20


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
    top_k_over: options.TopKOver = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve a model by OpenAI's HTTP interface, and a page to try it at /."""
    if any(find_spec(needed) is None for needed in ("starlette", "uvicorn")):
        raise LarosaError("larosa serve needs the extra: pip install 'larosa[serve]'")
    from larosa.serve import Limits, ServedModel, Server, bind, listen, open_llm

    for given, option in ((lossless, "--lossless"), (draft, "--draft"), (reference, "--reference")):
        if given:
            check_alone(f"serve {option}")
    template = None if chat_template is None else options.read_file(chat_template, "--chat-template")
    bound = bind(host, port) if this_rank() == 0 else None
    ranks = ranks_of(device, top_k_over)
    lead = None if ranks is None else Lead(ranks, give_up)
    drafter = options.drafter(draft, lossless, dtype, device, trust_remote_code)

    def opened(path: str, **own: Any) -> LLM:
        loaded = load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code, over=top_k_over)
        return open_llm(
            loaded, max_length=max_model_len, kv_cache_dtype=kv_cache_dtype, template=template, lead=lead, **own
        )

    llm = opened(model, lossless=lossless, draft=drafter)
    if bound is None:
        with until_told():
            follow(llm, max_num_seqs)
        return
    models = [ServedModel(served_model_name or _name(model), llm, max_num_seqs, max_waiting)]
    if reference is not None:
        called = _name(reference)
        called += "-reference" if called == models[0].name else ""
        models.append(ServedModel(called, opened(reference), max_num_seqs, max_waiting))
    app = Server(models, api_key, Limits(max_request_seconds, max_request_bytes)).app()
    names = ", ".join(served.name for served in models)

    def tell(url: str) -> None:
        stderr.print(f"Serving {names} at {url}", highlight=False)

    if lead is None:
        listen(app, bound, tell)
        return
    with until_told():
        listen(app, bound, tell, _GRACE_SECONDS)
        lead.end()


def _name(model: str) -> str:
    return os.path.basename(os.path.abspath(model))
