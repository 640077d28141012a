"""Counts and times in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from larosa.runtime import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Histogram:
    """How many observations are up to each of some bounds, in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        """The samples."""
        total = 0
        for bound, count in zip([*map(str, _SECONDS), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server has done since it started."""

    def __init__(self) -> None:
        #: By path and status.
        self.responses: Counter[tuple[str, int]] = Counter()
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, schedulers: Mapping[str, Scheduler]) -> str:
        """All of it, with what the schedulers have counted, by the name of the model."""
        lines: list[str] = []

        def family(name: str, kind: str, about: str, samples: Iterable[str]) -> None:
            lines.extend([f"# HELP larosa_{name} {about}", f"# TYPE larosa_{name} {kind}", *samples])

        def by_model(name: str, kind: str, about: str, value: Callable[[Scheduler], int]) -> None:
            samples = (
                f'larosa_{name}{{model="{_escaped(model)}"}} {value(scheduler)}'
                for model, scheduler in schedulers.items()
            )
            family(name, kind, about, samples)

        responses = (
            f'larosa_http_responses_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.responses.items())
        )
        family("http_responses_total", "counter", "Answers by path and status.", responses)
        finished = (
            f'larosa_sequences_total{{model="{_escaped(model)}",finish="{how}"}} {count}'
            for model, scheduler in schedulers.items()
            for how, count in scheduler.counts.finished.items()
        )
        family("sequences_total", "counter", "Texts by how they ended.", finished)
        by_model("sequences_running", "gauge", "Texts that are being written.", lambda s: s.running)
        by_model("sequences_waiting", "gauge", "Texts that wait for a place.", lambda s: s.waiting)
        by_model("prompt_tokens_total", "counter", "Tokens of prompts.", lambda s: s.counts.prompt_tokens)
        by_model(
            "cached_tokens_total",
            "counter",
            "Tokens of prompts that did not run again.",
            lambda s: s.counts.cached_tokens,
        )
        by_model("generated_tokens_total", "counter", "Tokens drawn.", lambda s: s.counts.drawn_tokens)
        about = "Seconds from a request to its first token."
        family("first_token_seconds", "histogram", about, self.first_token.lines("larosa_first_token_seconds"))
        about = "Seconds from a request to its last token."
        family("request_seconds", "histogram", about, self.duration.lines("larosa_request_seconds"))
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
