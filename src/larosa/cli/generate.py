"""`larosa generate`: text from a model, as it comes."""

from __future__ import annotations

from typing import Annotated

import typer

from larosa.calibration.sources import check_text
from larosa.checkpoint import load
from larosa.cli import options
from larosa.decoding import CacheDtype, EngineName
from larosa.decoding import generate as generate_text
from larosa.progress import stderr


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens this probable.")] = 1.0,
    seed: options.Seed = 0,
    engine: Annotated[
        EngineName | None,
        typer.Option(help="What runs the model; larosa's own engine where the device has kernels for it."),
    ] = None,
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Generate text, streamed; the speed follows on standard error."""
    options.check_json_file(json)
    check_text(prompt, "--prompt")
    loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    options.write_text(prompt)
    result = generate_text(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        engine=engine,
        kv_cache_dtype=kv_cache_dtype,
        on_text=options.write_text,
    )
    options.write_text("\n")
    speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s"
    stderr.print(f"{result.tokens} tokens{speed}, {result.engine} engine", highlight=False)
    options.write_json(json, {"model": model, "prompt": prompt, **result.to_dict()})
