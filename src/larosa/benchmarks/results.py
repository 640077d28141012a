"""What a benchmark has found, in the same words for every device."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from larosa.errors import LarosaError


class Row(Protocol):
    """One measurement."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        ...


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Benchmark(Generic[RowT]):
    """What ran where, the measured read bandwidth in bytes a second, and the rows."""

    machine: dict[str, str | int]
    bandwidth: float
    rows: list[RowT]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"machine": self.machine, "bandwidth": self.bandwidth, "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One decoder with one model; times in milliseconds per token, `tokens_per_second` by their median.

    `bytes_per_token` is what a token has to read: weights, scores, adapters, head, keys and values; where several ranks
    run the model, each of them. The floor is
    the time of that at the read bandwidth of the same run, `floor_fraction` how much of the median it makes up.
    `speedup` is over the row that each device's benchmark names.
    """

    shape: str
    dtype: str
    kv_cache_dtype: str
    row: str
    sparsity: float
    prompt_tokens: int
    tokens: int
    ms_per_token: float
    ms_per_token_p95: float
    tokens_per_second: float
    speedup: float
    bytes_per_token: int
    floor_ms: float
    floor_fraction: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def check_counts(prompt_tokens: int, tokens: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        LarosaError: no prompt, or so few tokens that they have no percentiles.
    """
    if prompt_tokens < 1 or tokens < 2:
        raise LarosaError("--prompt-tokens must be at least 1 and --tokens at least 2")


def per_token(seconds: list[float], read: int, bandwidth: float) -> dict[str, Any]:
    """The fields of a `DecodeRow` that follow from the seconds of its tokens and the bytes that each reads."""
    median, floor = statistics.median(seconds), read / bandwidth
    return {
        "ms_per_token": 1e3 * median,
        "ms_per_token_p95": 1e3 * statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        "tokens_per_second": 1 / median,
        "bytes_per_token": read,
        "floor_ms": 1e3 * floor,
        "floor_fraction": floor / median,
    }
