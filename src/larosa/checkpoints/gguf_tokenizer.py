"""The tokenizer in a GGUF file's metadata, which has the words and names the rules for splitting text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from larosa.errors import LarosaError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_GPT2: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
_DIGITS: list[Any] = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]
_LLAMA3, _QWEN2 = _split(_WORDS % r"\p{N}{1,3}"), _split(_WORDS % r"\p{N}")
#: By `tokenizer.ggml.pre`: how a byte-level tokenizer splits text before it merges.
_SPLITS: dict[str, list[Any]] = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _split(_TEKKEN),
}
#: Those that look a word up before they merge its letters, and of which llama.cpp adds a first token by default.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "tekken")


def read_tokenizer(path: Path, metadata: dict[str, Any], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model with an embedding of `vocabulary` rows.

    Raises:
        LarosaError: a kind, or rules for splitting, that are not known here; a word list that does not fit.
    """
    kind, words = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.tokens"]
    if kind not in ("gpt2", "llama"):
        raise LarosaError(f"{path}: tokenizer {kind!r} is not supported; supported: gpt2, llama")
    if len(words) > vocabulary:
        raise LarosaError(f"{path}: {len(words)} tokens in the metadata, {vocabulary} rows in the embedding")
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(words)
    split = str(metadata.get("tokenizer.ggml.pre"))
    if kind == "gpt2" and split not in _SPLITS:
        raise LarosaError(f"{path}: 'tokenizer.ggml.pre' = {split!r} is not supported; supported: {', '.join(_SPLITS)}")
    special = {
        name: words[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    tokenizer = _byte_level(metadata, words, split) if kind == "gpt2" else _sentencepiece(metadata, words, kinds)
    added = list(zip(words, kinds, strict=True))
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w, k in added if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w, k in added if k == _USER_DEFINED])
    starts = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or split in _WHOLE_WORDS)
    ends = metadata.get("tokenizer.ggml.add_eos_token", False)
    _add_ends(tokenizer, special.get("bos") if starts else None, special.get("eos") if ends else None)
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        **{f"{name}_token": word for name, word in special.items()},
    )
    loaded.chat_template = metadata.get("tokenizer.chat_template")
    return loaded


def _byte_level(metadata: dict[str, Any], words: list[str], split: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=split in _WHOLE_WORDS))
    if _SPLITS[split] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[split])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], words: list[str], kinds: list[int]) -> Tokenizer:
    ids = {word: index for index, word in enumerate(words)}
    scores = metadata["tokenizer.ggml.scores"]
    # The best word is merged first, however it falls into two.
    ranked = sorted((i for i, kind in enumerate(kinds) if kind == _NORMAL), key=lambda i: (-scores[i], i))
    merges = [
        (words[i][:at], words[i][at:])
        for i in ranked
        for at in range(1, len(words[i]))
        if words[i][:at] in ids and words[i][at:] in ids
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unknown_word = None if unknown is None else words[unknown]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token=unknown_word, fuse_unk=True, byte_fallback=True))
    # A first space is put before every text, and taken off again.
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normal: list[Any] = [normalizers.Prepend("▁")] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", "▁")])
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, *([decoders.Strip(" ", 1, 0)] if spaced else [])])
    return tokenizer


def _add_ends(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    before, after = ([] if first is None else [first]), ([] if last is None else [last])
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *after])],
        )
