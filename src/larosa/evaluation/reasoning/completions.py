"""Sampling answers to problems with the decode engine, several at a time, kept in a log as they come."""

from __future__ import annotations

import hashlib
import json
import math
import queue
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from larosa.architectures.context import context_length
from larosa.decoding.chat import conversation, turn_ends
from larosa.decoding.generation import prompt_ids
from larosa.decoding.sampling import Sampling
from larosa.errors import LarosaError
from larosa.evaluation.reasoning.problems import Problem
from larosa.runtime import LLM, Event, Request, Scheduler
from larosa.utils.progress import track

#: As the paper's and Open-R1's evaluations draw tokens.
TEMPERATURE, TOP_P = 0.6, 0.95


@dataclass(frozen=True)
class Completion:
    """What the model said to a problem.

    Args:
        problem: the problem's id.
        sample: which of its samples, from 0.
        text: without the prompt.
        tokens: drawn ones.
        finished: whether the model ended it; else it was cut off.
    """

    problem: str
    sample: int
    text: str
    tokens: int
    finished: bool


def complete(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    log: Path,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int = 0,
    max_sequences: int = 8,
) -> list[Completion]:
    """Answers to every problem, `samples` of each, in the order of the problems.

    Every answer is drawn with a seed of its own, which follows from `seed`, the problem and the sample, so that it does
    not depend on what else is asked for. Answers in `log` are not drawn again: a stopped run goes on.

    Args:
        model: dense or converted, in evaluation mode; the decode engine runs it.
        tokenizer: the model's. Prompts go through its chat template; without one they are continued as they are.
        log: a JSON-lines file, made where there is none; it must be of the same model and settings.
        max_new_tokens: cut an answer off after so many tokens, or where the model's context ends.
        max_sequences: answers in the making at once.

    Raises:
        LarosaError: a prompt that leaves no room for an answer, a model that the engine cannot run, or a log that
            cannot be written to.
    """
    done = _read(log)
    wanted = [(problem, sample) for problem in problems for sample in range(samples)]
    missing = [(problem, sample) for problem, sample in wanted if (problem.id, sample) not in done]
    if missing:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                for found in _draw(model, tokenizer, missing, max_new_tokens, seed, max_sequences):
                    file.write(json.dumps(asdict(found)) + "\n")
                    file.flush()
                    done[found.problem, found.sample] = found
        except OSError as error:
            raise LarosaError(f"{log}: {error.strerror}") from None
    return [done[problem.id, sample] for problem, sample in wanted]


def _read(log: Path) -> dict[tuple[str, int], Completion]:
    """What a log holds; a last line that a stopped run left unfinished is cut off."""
    if not log.exists():
        return {}
    lines = log.read_bytes().split(b"\n")
    if lines.pop():
        log.write_bytes(b"".join(line + b"\n" for line in lines))
    found = [Completion(**json.loads(line)) for line in lines]
    return {(each.problem, each.sample): each for each in found}


def _draw(
    model: Any,
    tokenizer: Any,
    wanted: Sequence[tuple[Problem, int]],
    max_new_tokens: int,
    seed: int,
    max_sequences: int,
) -> Iterator[Completion]:
    """The completions in the order in which they end."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    ends = turn_ends(tokenizer) if chat else frozenset()
    prompts = {problem.id: problem.prompt for problem, _ in wanted}
    ids = {
        key: prompt_ids(model, tokenizer, conversation(None, prompt) if chat else prompt).tolist()
        for key, prompt in prompts.items()
    }
    longest, context = max(map(len, ids.values())), context_length(model.config)
    if longest >= context:
        raise LarosaError(f"a prompt of {longest} tokens leaves no room for an answer in a context of {context}")
    llm = LLM(model, tokenizer, min(context, longest + max_new_tokens))
    finished: queue.SimpleQueue[Completion | Exception] = queue.SimpleQueue()
    scheduler = Scheduler(llm, min(max_sequences, len(wanted)), max_waiting=len(wanted))
    try:
        requests = [
            Request(
                ids[problem.id],
                min(max_new_tokens, llm.max_length - len(ids[problem.id])),
                Sampling(temperature=TEMPERATURE, top_p=TOP_P, seed=_seed(seed, problem, sample)),
                ends=ends,
            )
            for problem, sample in wanted
        ]
        receivers = [_Receiver(problem.id, sample, finished) for problem, sample in wanted]
        scheduler.submit(requests, receivers, math.inf)
        for _ in track(range(len(wanted)), "Answers"):
            found = finished.get()
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        scheduler.close()


class _Receiver:
    """Puts an answer together and hands it on once it has ended."""

    def __init__(self, problem: str, sample: int, finished: queue.SimpleQueue[Completion | Exception]) -> None:
        self._problem, self._sample, self._finished = problem, sample, finished
        self._text: list[str] = []
        self._tokens = 0

    def __call__(self, event: Event | Exception) -> None:
        if isinstance(event, Exception):
            self._finished.put(event)
            return
        self._text.append(event.text)
        self._tokens += event.token is not None
        if event.finish_reason is not None:
            text, ended = "".join(self._text), event.finish_reason == "stop"
            self._finished.put(Completion(self._problem, self._sample, text, self._tokens, ended))


def _seed(seed: int, problem: Problem, sample: int) -> int:
    digest = hashlib.sha256(f"{seed} {sample} {problem.prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
