"""`larosa generate`: text from a model, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from larosa.cli import options
from larosa.cli.together import check_alone, load_model
from larosa.data.text import check_text
from larosa.decoding import CacheDtype
from larosa.decoding import generate as generate_text
from larosa.decoding.chat import conversation
from larosa.errors import LarosaError


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    file: Annotated[
        str | None, typer.Option(help="Read the prompt from this file, or from standard input where it is -.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, by the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the model is told before.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    stop: options.Stop = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = 0,
    engine: options.EngineOption = None,
    kv_cache_dtype: options.KvCacheDtype = CacheDtype.AUTO,
    lossless: options.Lossless = False,
    draft: options.Draft = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    top_k_over: options.TopKOver = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.JsonFile = None,
) -> None:
    """Generate text, streamed; the speed follows on standard error.

    The checkpoint's generation_config.json gives end tokens and what of the sampling no option says.
    """
    options.check_json_file(json)
    if prompt is not None and file is not None:
        raise LarosaError("--prompt and --file: give one of them")
    if system is not None and not chat:
        raise LarosaError("--system is of a conversation: give --chat with it")
    text = (prompt or "") if file is None else _read(file)
    check_text(text, "--prompt" if file is None else file)
    check_text(system or "", "--system")
    if draft is not None:
        check_alone("generate --draft")
    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, over=top_k_over
    )
    drafter = options.drafter(draft, lossless, dtype, device, trust_remote_code)
    options.note_unused_settings(loaded)
    if not chat:
        options.write_text(text)
    result = generate_text(
        loaded,
        tokenizer,
        conversation(system, text) if chat else text,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        engine=engine,
        kv_cache_dtype=kv_cache_dtype,
        lossless=lossless,
        draft=drafter,
        on_text=options.write_text,
    )
    options.write_text("\n")
    options.tell_speed(result)
    options.write_json(json, {"model": model, "prompt": text, **result.to_dict()})


def _read(file: str) -> str:
    """A file's text without its last line end, which editors and shells put there."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise LarosaError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise LarosaError(f"{file}: {error.strerror} (--file)") from None
