"""How likely tokens were, by the model's own distribution: before temperature and all else that drawing changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_INCOMPLETE = "\ufffd"

#: Rows whose logits are computed at a time: with a vocabulary of 128,000 they take 16 MiB.
_ROWS = 32


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, None for a text's first, and the likeliest tokens at its place, likeliest first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of one token for each row of logits [N, vocabulary], with the `top` likeliest ones."""
    # Subtracting afterwards rounds no more than log_softmax, and only the entries that are asked for.
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = (logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]) - total)[:, 0].tolist()
    values, indices = logits.topk(top, dim=-1)
    rows = zip(tokens, own, indices.tolist(), (values - total).tolist(), strict=True)
    return [TokenLogprob(token, logprob, tuple(zip(ids, likely, strict=True))) for token, logprob, ids, likely in rows]


class PromptLogprobs:
    """Gathers the log-probabilities of a prompt's tokens as its pieces run."""

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        self._prompt, self._top = prompt, top
        #: So far, of the prompt's tokens in order.
        self.found = [TokenLogprob(prompt[0], None, ())]

    def put(self, logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> None:
        """Take what `Session.advance` gives for the next piece, [tokens, D], and what makes logits of it."""
        for rows in hidden.split(_ROWS):
            at = len(self.found)
            following = self._prompt[at : at + len(rows)]
            if following:
                self.found += token_logprobs(logits(rows[: len(following)]), following, self._top)


class TokenTexts:
    """Tokens as text of their own, special ones included: what they add behind another token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int, before: int | None) -> str:
        r"""The token's text after another one; `bytes:\x..` where it is no whole characters."""
        text = self._added(token, before)
        if _INCOMPLETE not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token, before))

    def bytes(self, token: int, before: int | None) -> list[int]:
        """The token's bytes after another one."""
        text = self._added(token, before)
        if _INCOMPLETE not in text:
            return list(text.encode())
        spelt: str = self._tokenizer.convert_ids_to_tokens(token)
        if spelt.startswith("<0x") and len(spelt) == 6:
            return [int(spelt[3:5], 16)]
        if all(letter in _BYTE_OF for letter in spelt):
            return [_BYTE_OF[letter] for letter in spelt]
        return list(text.encode())

    def _added(self, token: int, before: int | None) -> str:
        if before is not None:
            alone, both = self._decode(before), self._decode(before, token)
            if both.startswith(alone) and not alone.endswith(_INCOMPLETE):
                return both[len(alone) :]
        return self._decode(token)

    def _decode(self, *tokens: int) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def _byte_level() -> dict[str, int]:
    """Byte-level BPE's letters: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level()
