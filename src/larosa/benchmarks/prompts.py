"""Prompts of ordinary kinds, for what depends on the text: how many drafted tokens are right."""

from __future__ import annotations

from typing import Any

import torch

from larosa.data.text import BUNDLED, TextSplit, read_text, tokenize
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
#: Passages are of so many characters at least; so many of their first ones are to be continued.
_PASSAGE, _BEGINNING = 600, 200
#: Prompts of each kind.
_PROMPTS = len(_QUESTIONS)

#: What prompts there are.
KINDS = ("questions", "prose", "code", "summaries")


def prompts(kind: str, model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """The prompts of a kind, each [length] int64.

    Questions and summaries are asked for by the tokenizer's chat template, if it has one; prose and code are to be
    continued.

    Args:
        kind: one of `KINDS`.
    """
    if kind in ("prose", "code"):
        texts = [passage[:_BEGINNING].rpartition(" ")[0] for passage in _passages()] if kind == "prose" else _CODE
        return [tokenize(text, tokenizer, model.config.vocab_size) for text in texts]
    asked = [f"Sum up this text:\n\n{passage}" for passage in _passages()] if kind == "summaries" else _QUESTIONS
    talks = tokenizer.chat_template is not None
    return [prompt_ids(model, tokenizer, conversation(None, text) if talks else text) for text in asked]


def _passages() -> list[str]:
    """First paragraphs of articles of the bundled text."""
    articles = read_text(BUNDLED, TextSplit.TEST).split("\n= ")
    paragraphs = [article.split("\n\n")[1].strip() for article in articles]
    return [paragraph for paragraph in paragraphs if len(paragraph) >= _PASSAGE][:_PROMPTS]
