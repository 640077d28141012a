"""A byte-level BPE tokenizer that gives every UTF-8 text back exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from corpus import RecipeError

END_OF_TEXT = "<|endoftext|>"
MAX_PIECE = 16  # keeps rules, dashes and long repeated names out of a small vocabulary


def train_tokenizer(documents: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise RecipeError(f"--vocab-size must exceed {len(alphabet)}, got {vocab_size}")
    # No normaliser and no prefix space: either would break the exact round trip.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        max_token_length=MAX_PIECE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise RecipeError(
            f"the corpus yields only {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "lower --vocab-size or give more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # Newer versions of transformers write a class name that older ones cannot load.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        raise RecipeError(f"no tokenizer.json in tokenizer folder {folder}")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], batch: int = 512) -> np.ndarray:
    """One stream of token ids, each document closed by the end-of-text token."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    if not isinstance(end, int):
        raise RecipeError(f"the tokenizer has no {END_OF_TEXT} token")
    backend = tokenizer.backend_tokenizer
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), batch):
        part = list(documents[start : start + batch])
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, end], dtype=np.int32))
    return np.concatenate(pieces)
