"""Prompts of ordinary kinds, for what depends on the text: how many drafted tokens are accepted."""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch

from larosa.calibration.sources import tokenize
from larosa.decoding.chat import conversation
from larosa.decoding.generation import prompt_ids

_QUESTIONS = (
    "Why is the sky blue? Answer in a few sentences.",
    "What should I look at when I buy a used bicycle?",
    "Explain to a child how a refrigerator keeps food cold.",
    "I have rice, eggs and tomatoes. What can I cook tonight?",
)
_CODE = (
    'def median(numbers: list[float]) -> float:\n    """The middle of the sorted numbers."""\n',
    "import csv\nfrom collections import defaultdict\n\n\ndef totals(path):\n    # Sum 'price' by 'customer'.\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "<!DOCTYPE html>\n<html>\n<head>\n<title>Shopping list</title>\n</head>\n<body>\n<ul>\n  <li>Bread</li>\n",
)
#: Paragraphs of so many characters are told to be summed up, and their beginnings to be continued.
_PARAGRAPH, _BEGINNING, _PASSAGES = 600, 200, 4

#: What prompts there are.
KINDS = ("questions", "prose", "code", "summaries")


def prompts(kind: str, model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """The prompts of a kind, each [length] int64: by the tokenizer's chat template if it has one, else as plain text.

    Args:
        kind: one of `KINDS`. Prose and code are continued as they are, whatever the tokenizer has.
    """
    if kind in ("prose", "code"):
        texts = [passage[:_BEGINNING].rpartition(" ")[0] for passage in _passages()] if kind == "prose" else _CODE
        return [tokenize(text, tokenizer, model.config.vocab_size) for text in texts]
    asked = [f"Sum up this text:\n\n{passage}" for passage in _passages()] if kind == "summaries" else _QUESTIONS
    talks = tokenizer.chat_template is not None
    return [prompt_ids(model, tokenizer, conversation(None, text) if talks else text) for text in asked]


def _passages() -> list[str]:
    """Paragraphs of the bundled text, of different articles."""
    text = resources.files("larosa.assets").joinpath("evaluation.txt").read_text("utf-8")
    articles = [article.partition("\n\n")[2] for article in text.split("\n= ")]
    first = [article.partition("\n\n")[0].strip() for article in articles]
    return [paragraph for paragraph in first if len(paragraph) >= _PARAGRAPH][:_PASSAGES]
