"""An experiment: one table or figure of the paper, or a close group of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from larosa.config import SITES
from larosa.reproduce.context import Context
from larosa.reproduce.results import Cell, Column, Results
from larosa.reproduce.settings import ReproduceSettings

#: The columns that say what a model lost, most telling first.
QUALITY = [Column("KL to dense (nats/token)", ".4f"), Column("same top token", ".1%"), Column("perplexity", ".3f")]

NOT_REACHABLE = "not reachable"

#: Under every table that has the paper's numbers in it.
PAPER_BUDGET = (
    "The paper's numbers are at its own budget (equations 17 and 18), which skips fewer weights than it says: "
    "46 to 48% at a nominal 50% for its models. Our rows all skip the same fraction of weights."
)


@dataclass(frozen=True)
class Experiment:
    """What it is called, what the paper shows there, and how to run it.

    `lacks` names what a run of everything cannot do without, or None; the experiment alone may still try. A run of
    everything goes on, with the reason, without one that is `left_out_where_refused`.
    """

    name: str
    title: str
    claim: str
    run: Callable[[Context], Results]
    lacks: Callable[[ReproduceSettings], str | None] = lambda _: None
    left_out_where_refused: bool = False


def quality(found: dict[str, Any]) -> list[Cell]:
    """The cells of `QUALITY` for one evaluation; a dense one has no distance from itself."""
    return [found["kl"], found["top1"], found["perplexity"]]


def sites_text(values: Any, form: str = ".2f") -> str:
    """Four numbers, one a site, in a few characters."""
    return ", ".join(f"{site} {values[site]:{form}}" for site in SITES)
